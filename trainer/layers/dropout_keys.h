#pragma once
#include <ATen/ATen.h>

#include <map>
#include <string>
#include <utility>

namespace corank {

/// The keys of a run's dropouts (methods 10.7): pure functions of the run's seed, the dropout's place and the step.
/// They are on the device, those of one step at a time and all written in one copy: from the second step on at the same
/// addresses, so that a captured graph can be replayed with the next step's.
class DropoutKeys {
 public:
  DropoutKeys(uint64_t seed, at::Device device) : seed_(seed), device_(device) {}
  /// From here on the keys are those of `step`.
  void begin(int64_t step);
  /// int64 [1], as ops::Dropout takes it. `kind` and `place` name it among all.
  at::Tensor key(const std::string& kind, const std::string& place);

 private:
  uint64_t seed_;
  at::Device device_;
  int64_t step_ = 0;
  std::map<std::pair<std::string, std::string>, at::Tensor> keys_;  ///< by kind and place
  at::Tensor all_;                                                  ///< what the keys are parts of
};

}  // namespace corank
