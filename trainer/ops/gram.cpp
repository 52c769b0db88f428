#include "trainer/ops/gram.h"

namespace corank::ops {
namespace {

at::Tensor off_identity(const at::Tensor& gram_MRR) {
  return gram_MRR - at::eye(gram_MRR.size(-1), gram_MRR.options());
}

}  // namespace

at::Tensor gram(const at::Tensor& a_MXY, Orthonormal what) {
  const at::Tensor turned_MYX = a_MXY.transpose(1, 2);
  return what == Orthonormal::rows ? at::bmm(a_MXY, turned_MYX) : at::bmm(turned_MYX, a_MXY);
}

at::Tensor orthogonality(const at::Tensor& gram_MRR) {
  return at::linalg_vector_norm(off_identity(gram_MRR), 2, {1, 2});
}

at::Tensor orthogonality_gradient(const at::Tensor& gram_MRR, const at::Tensor& a_MXY, Orthonormal what) {
  const at::Tensor difference = off_identity(gram_MRR);
  const at::Tensor norm = at::linalg_vector_norm(difference, 2, {1, 2}, /*keepdim=*/true);
  const at::Tensor factor_MRR = difference * at::where(norm > 0, 2 / norm, at::zeros_like(norm));
  return what == Orthonormal::rows ? at::bmm(factor_MRR, a_MXY) : at::bmm(a_MXY, factor_MRR);
}

}  // namespace corank::ops
