#include "trainer/ops/matmul.h"

namespace corank::ops {

at::Tensor matmul_to(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype) {
  if (a.scalar_type() == dtype) return at::mm(a, b);
  if (a.is_cuda() && dtype == at::kFloat) return at::mm(a, b, dtype);
  return at::mm(a, b).to(dtype);
}

at::Tensor affine(const at::Tensor& x_NI, const at::Tensor& w_OI, const at::Tensor& bias_O) {
  return bias_O.defined() ? at::addmm(bias_O, x_NI, w_OI.t()) : at::mm(x_NI, w_OI.t());
}

void add_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
  if (sum.defined()) {
    sum.addmm_(a, b);
  } else {
    sum = at::mm(a, b);
  }
}

void add_to(at::Tensor& sum, const at::Tensor& t) {
  if (sum.defined()) {
    sum.add_(t);
  } else {
    sum = t;
  }
}

}  // namespace corank::ops
