#pragma once
#include <utility>

#include "trainer/ops/weight.h"

namespace corank::ops {

/// LayerNorm with the residual addition in front (arXiv 1607.06450): h = residual + delta; y = (h - mean) / sqrt(var +
/// eps) * w + b. An undefined `delta` stands for zero. Statistics in float32 (float64 inputs: float64). x: [N, D] any
/// floating dtype; w, b: [D]. Returns (h, y), both [N, D] in the input's dtype. Kept for backward: h and two numbers a
/// row. ATen's kernels on every device.
std::pair<at::Tensor, at::Tensor> add_layer_norm(const at::Tensor& residual_ND, const at::Tensor& delta_ND,
                                                 const Weight& weight_D, const Weight& bias_D, double eps);

}  // namespace corank::ops
