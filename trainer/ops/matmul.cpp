#include "trainer/ops/matmul.h"

namespace corank::ops {

at::Tensor matmul_to(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype) {
  if (a.scalar_type() == dtype) return at::mm(a, b);
  if (a.is_cuda() && dtype == at::kFloat) return at::mm(a, b, dtype);
  return at::mm(a, b).to(dtype);
}

}  // namespace corank::ops
