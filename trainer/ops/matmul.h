#pragma once
#include <ATen/ATen.h>

namespace corank::ops {

/// a @ b with the result in `dtype`, accumulated and rounded once where the device can (CUDA: bfloat16 -> float32).
at::Tensor matmul_to(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype);

}  // namespace corank::ops
