#pragma once
#include <ATen/ATen.h>

#include "comm/communicator.h"

/// Edges of a tensor-parallel region: f and g of Megatron-LM (arXiv 1909.08053, section 3).
namespace corank {

/// f. Forward: x itself. Backward: collective over tp; sums the ranks' partial gradients in place, so x must feed
/// exactly one node (the linears of a block read it together).
at::Tensor enter_tensor_region(const at::Tensor& x, Communicator& tp);

/// g. Forward: collective over tp; sums the ranks' partial outputs in place. Backward: the gradient itself.
at::Tensor leave_tensor_region(const at::Tensor& y, Communicator& tp);

}  // namespace corank
