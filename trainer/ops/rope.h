#pragma once
#include <ATen/ATen.h>

#include <utility>

namespace corank::ops {

/// Rotary position embedding (arXiv 2104.09864) with Llama's half-split pairing: feature i turns with feature i + d/2.
/// q_NHd, k_NKd: any floating dtype; cos_Td, sin_Td: [T, d/2] float32 (float64 for float64 inputs) tables by position;
/// positions_N: int64 < T. Returns new tensors. Kept for backward: nothing of the activations (the inverse rotation).
std::pair<at::Tensor, at::Tensor> rope(const at::Tensor& q_NHd, const at::Tensor& k_NKd, const at::Tensor& cos_Td,
                                       const at::Tensor& sin_Td, const at::Tensor& positions_N);

}  // namespace corank::ops
