#pragma once
#include <utility>

#include "trainer/ops/weight.h"

namespace corank::ops {

/// RMSNorm with the residual addition in front (arXiv 1910.07467): h = residual + delta; y = h / sqrt(mean(h^2) + eps)
/// * w. An undefined `delta` stands for zero. Statistics in float32 (float64 inputs: float64). x: [N, D] any floating
/// dtype; w: [D]. Returns (h, y), both [N, D] in the input's dtype. Kept for backward: h and the per-row reciprocal
/// norm.
std::pair<at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& residual_ND, const at::Tensor& delta_ND,
                                               const Weight& weight_D, double eps);

/// The same over the last dimension of [.., D] without a residual (q and k norms). Returns y.
at::Tensor rms_norm(const at::Tensor& x, const Weight& weight_D, double eps);

}  // namespace corank::ops
