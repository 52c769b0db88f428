#pragma once
#include <ATen/ATen.h>

namespace corank::ops {

/// Gradient of |G - I|_F for G = A A^T, A [R, I]: 2 (G - I) A / |G - I|_F, 0 where G is I (methods 7.2). `gram_RR` is
/// the whole G; A may be a block of columns, the result is this block's.
at::Tensor orthogonality_gradient(const at::Tensor& gram_RR, const at::Tensor& a_RI);

/// |G - I|_F.
at::Tensor orthogonality(const at::Tensor& gram_RR);

}  // namespace corank::ops
