#pragma once
#include <ATen/ATen.h>

namespace corank::ops {

/// silu(gate) * up (arXiv 2002.05202), both [N, F] of one floating dtype; arithmetic in float32 (float64: float64),
/// rounded once. Kept for backward: gate and up.
at::Tensor swiglu(const at::Tensor& gate_NF, const at::Tensor& up_NF);

}  // namespace corank::ops
