#pragma once
#include <ATen/ATen.h>

#include <cstdint>
#include <optional>

namespace corank::ops {

/// The leading part of W = U diag(s) V^T: u [O, R] and v [I, R] with orthonormal columns, s [R] descending. The signs
/// of a pair of columns are free.
struct SingularPart {
  at::Tensor u_OR, s_R, v_IR;
};

/// Exact, of a float32 or float64 matrix; in float64, because CUDA's solver loses digits in float32 (3e-5 of the
/// product of the leading parts where the next singular value is near).
SingularPart leading_svd(const at::Tensor& w_OI, int64_t rank);
/// Randomised with `iterations` subspace iterations and no oversampling (Halko et al., arXiv 0909.4061, algorithms 4.4
/// and 5.1; methods 8.2); `key` draws its start.
SingularPart randomised_svd(const at::Tensor& w_OI, int64_t rank, int64_t iterations, uint64_t key);

/// leading_svd of b a, float64, from the factors alone: nothing of size [O, I] is formed. At most as many
/// singular values as there can be.
SingularPart product_svd(const at::Tensor& b_OR, const at::Tensor& a_RI, int64_t rank);

}  // namespace corank::ops
