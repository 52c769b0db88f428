#pragma once
#include <ATen/ATen.h>

// Legend: M matrices of one shape, X by Y; R the side that should be orthonormal.
namespace corank::ops {

/// What of a matrix should be orthonormal: its rows (R = X) or its columns (R = Y).
enum class Orthonormal { rows, columns };

/// G [M, R, R] = A A^T or A^T A of every matrix [M, X, Y].
at::Tensor gram(const at::Tensor& matrices_MXY, Orthonormal what);

/// |G - I|_F of every matrix [M].
at::Tensor orthogonality(const at::Tensor& gram_MRR);

/// Its gradient [M, X, Y] (methods 7.2): for rows 2 (G - I) A / |G - I|_F, 0 where G is I. `gram_MRR` is the whole G;
/// the matrices may be blocks of their other side, and so is the result.
at::Tensor orthogonality_gradient(const at::Tensor& gram_MRR, const at::Tensor& matrices_MXY, Orthonormal what);

}  // namespace corank::ops
