#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "comm/communicator.h"
#include "trainer/weights/residency.h"

namespace corank {

/// The order in which weights are asked for from one forward pass to the next: learned in one, foretold in the
/// following ones.
class Walk {
 public:
  void begin();
  void visit(int64_t order);
  /// Up to `count` different weights that an earlier walk that began like this one asked for next.
  std::vector<int64_t> next(size_t count) const;

 private:
  std::vector<int64_t> known_, current_;
};

/// Which weights are on the device: the one asked for last and kSlots - 1 more, the next ones or the last ones. How
/// many are fetched follows from the order of asking alone, whether they are fetched ahead or not.
class Slots {
 public:
  static constexpr size_t kSlots = 4;  ///< groups of weights with one input: about a layer

  void clear() { held_.clear(); }
  bool has(int64_t order) const;
  /// `order` is asked for now, and `next` will be, in this order. What makes way for them.
  std::vector<int64_t> ask(int64_t order, const std::vector<int64_t>& next = {});

 private:
  std::vector<int64_t> held_;  ///< what was asked for last is in front
};

/// What each of `ranks` keeps of `bytes` that they share: equal parts, in whole alignments of kernels.
int64_t share_of(int64_t bytes, int64_t ranks);

/// Weights whose stored bytes (4 bits a weight stay 4 bits) are divided evenly between the ranks of `group`, as the
/// frozen part of a ZeRO-3 run (arXiv 1910.02054): each rank keeps 1/D and gathers the rest for each pass, the next
/// weight while this one multiplies, again in backward. Two weights, or two groups of weights with one input, are whole
/// on the device at a time. Asking is collective: all ranks of `group`, which nobody else uses, ask in the same order.
/// Purpose base_gathers.
std::shared_ptr<Residency> sharded_over(std::unique_ptr<Communicator> group);

}  // namespace corank
