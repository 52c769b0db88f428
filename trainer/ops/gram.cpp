#include "trainer/ops/gram.h"

namespace corank::ops {
namespace {

at::Tensor off_identity(const at::Tensor& gram_RR) { return gram_RR - at::eye(gram_RR.size(0), gram_RR.options()); }

}  // namespace

at::Tensor orthogonality(const at::Tensor& gram_RR) { return at::linalg_vector_norm(off_identity(gram_RR)); }

at::Tensor orthogonality_gradient(const at::Tensor& gram_RR, const at::Tensor& a_RI) {
  const at::Tensor difference = off_identity(gram_RR), norm = at::linalg_vector_norm(difference);
  return at::mm(difference * at::where(norm > 0, 2 / norm, at::zeros_like(norm)), a_RI);
}

}  // namespace corank::ops
