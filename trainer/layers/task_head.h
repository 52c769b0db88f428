#pragma once
#include <ATen/ATen.h>

#include "comm/communicator.h"

namespace corank {

/// What a model is trained for: from last hidden states to a loss. Targets are those of a Batch, or a range of them:
/// `target_rows_M` rows of h_ND, `targets_M` what is to be found there.
class TaskHead {
 public:
  virtual ~TaskHead() = default;
  /// Collective over tp. The sum of the targets' losses, a float64 scalar, equal on all tp ranks.
  virtual at::Tensor loss_sum(const at::Tensor& h_ND, const at::Tensor& target_rows_M, const at::Tensor& targets_M,
                              Communicator& tp) const = 0;
  /// Collective over tp, without a gradient: float64 [2], that sum and the number of targets that were found.
  virtual at::Tensor score(const at::Tensor& h_ND, const at::Tensor& target_rows_M, const at::Tensor& targets_M,
                           Communicator& tp) const = 0;
};

}  // namespace corank
