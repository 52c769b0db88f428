#include "trainer/weights/matrix.h"

namespace corank {
namespace {

void add_term(const at::Tensor& sum, const LowRankTerm& term) {
  if (term.u_NR.defined()) sum.addmm_(term.u_NR, term.m_RX, /*beta=*/1, /*alpha=*/term.scale);
}

}  // namespace

at::Tensor Matrix::multiply(const at::Tensor& x_NI, const at::Tensor& bias_O, const LowRankTerm& term) const {
  const at::Tensor w_OI = unpack(Pass::forward);
  const at::Tensor y_NO = bias_O.defined() ? at::addmm(bias_O, x_NI, w_OI.t()) : at::mm(x_NI, w_OI.t());
  add_term(y_NO, term);
  return y_NO;
}

void Matrix::multiply_transposed(const at::Tensor& g_NO, const at::Tensor& dx_NI, Write write,
                                 const LowRankTerm& term) const {
  if (write == Write::over) {
    at::Tensor out = dx_NI;
    at::mm_out(out, g_NO, unpack(Pass::backward));
  } else {
    dx_NI.addmm_(g_NO, unpack(Pass::backward));
  }
  add_term(dx_NI, term);
}

std::unique_ptr<const Matrix> Matrix::unpacked(Pass pass) const { return std::make_unique<DenseMatrix>(unpack(pass)); }

}  // namespace corank
