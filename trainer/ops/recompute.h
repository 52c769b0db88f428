#pragma once
#include <torch/csrc/autograd/variable.h>

#include <functional>

namespace corank::ops {

using Block = std::function<torch::autograd::variable_list(const torch::autograd::variable_list&)>;

/// Activation checkpointing (arXiv 1604.06174): runs `block` without keeping what its nodes save, and runs it again in
/// backward. Kept: the inputs. `block` must give the same results both times and make the same collective calls; leaves
/// inside it receive their gradients in backward. Inputs may be undefined.
torch::autograd::variable_list recompute(const Block& block, const torch::autograd::variable_list& inputs);

}  // namespace corank::ops
