#pragma once
#include <ATen/ATen.h>

namespace corank::ops {

/// `x` as the sums over its rows are made: float64 stays, all else becomes float32.
inline at::Tensor wide(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? x : x.to(at::kFloat); }

}  // namespace corank::ops
