#pragma once
#include <string>
#include <utility>
#include <vector>

#include "comm/mesh.h"
#include "trainer/layers/parameters.h"
#include "trainer/ops/adamw.h"

namespace corank {

struct OptimizerOptions {
  ops::AdamW adamw;
  double weight_decay = 0;
};

/// AdamW over a ParameterStore: moments in flat buffers laid out like its masters. Parameters with equal decay and
/// learning-rate scale that lie side by side are one update.
class Optimizer {
 public:
  /// `store` is borrowed and allocated.
  Optimizer(ParameterStore& store, OptimizerOptions options);

  /// One update from the store's gradients; `step` counts from 1 at the start and after a restart. Refreshes the
  /// compute copies. Learning rates and `step` reach the kernels as tensors of the device. `skip`: a float32 scalar on
  /// the device; where it is 1, nothing changes.
  void step(double learning_rate, int64_t step, const at::Tensor& skip);
  /// Moments zero, as at the start.
  void restart();

  const at::Tensor& exp_avg() const { return exp_avg_; }
  const at::Tensor& exp_avg_sq() const { return exp_avg_sq_; }

 private:
  struct Group {
    int64_t begin, count;
    double weight_decay, lr_scale;
    at::Tensor learning_rate;  ///< as ops::adamw takes it
  };
  ParameterStore& store_;
  OptimizerOptions options_;
  std::vector<Group> groups_;
  at::Tensor exp_avg_, exp_avg_sq_, step_;
};

/// Collective over tp, and over the world where data-parallel ranks share parameters (purpose gradient_norm). Euclidean
/// norm of the whole gradient over all trainable parameters, a float64 scalar on the device, equal on all ranks:
/// replicated tensors once, shards summed over tp, shared parts over the world.
at::Tensor gradient_norm(const ParameterStore& store, const Mesh& mesh);

}  // namespace corank
