#pragma once
#include <ATen/ATen.h>

// Legend: N tokens, I in, O out.
namespace corank::ops {

/// a @ b with the result in `dtype`, accumulated and rounded once where the device can (CUDA: bfloat16 -> float32).
at::Tensor matmul_to(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype);
/// x W^T + bias, where there is one.
at::Tensor affine(const at::Tensor& x_NI, const at::Tensor& w_OI, const at::Tensor& bias_O);
/// sum += a b; an undefined sum becomes the product.
void add_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b);
/// sum += t; an undefined sum becomes t.
void add_to(at::Tensor& sum, const at::Tensor& t);

}  // namespace corank::ops
