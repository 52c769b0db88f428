#include "trainer/ops/dora.h"

namespace corank::ops {
namespace {

/// x times one number a column, in the higher precision of the two, rounded once to x's dtype.
at::Tensor scale_columns(const at::Tensor& x_NO, const at::Tensor& factor_O) {
  at::Tensor y_NO = at::empty_like(x_NO);
  return at::mul_out(y_NO, x_NO, factor_O);
}

at::Tensor with_bias(at::Tensor y_NO, const at::Tensor& bias_O) { return bias_O.defined() ? y_NO.add_(bias_O) : y_NO; }

at::Tensor column_dots(const at::Tensor& a_NO, const at::Tensor& b_NO, at::ScalarType dtype) {
  return (a_NO.to(dtype) * b_NO).sum(0);
}

}  // namespace

std::vector<at::Tensor> DoraUpdate::leaves() const { return {f_.a_RI.leaf, f_.b_OR.leaf, s_.magnitude_leaf_O}; }

at::Tensor DoraUpdate::forward(const at::Tensor& x_NI, const Matrix& w, const at::Tensor& bias_O,
                               std::vector<at::Tensor>& saved) const {
  const at::Tensor w_OI = w.dense_OI();
  const at::Tensor dropped_NI = dropout(x_NI, f_.dropout);
  const at::Tensor u_NR = at::mm(dropped_NI, f_.a_RI.value.t());
  at::Tensor q_NO = at::mm(dropped_NI, w_OI.t());
  saved.push_back(u_NR);
  if (!f_.dropout.active()) {
    q_NO.addmm_(u_NR, f_.b_OR.value.t(), /*beta=*/1, /*alpha=*/f_.scale);
    saved.push_back(q_NO);
    return with_bias(scale_columns(q_NO, s_.gamma_O), bias_O);
  }
  const at::Tensor low_NO = at::mm(u_NR, f_.b_OR.value.t()).mul_(f_.scale);
  at::Tensor y_NO = at::mm(x_NI, w_OI.t());
  y_NO.add_(scale_columns(q_NO, s_.gamma_O - 1)).add_(scale_columns(low_NO, s_.gamma_O));
  saved.push_back(q_NO.add_(low_NO));
  return with_bias(y_NO, bias_O);
}

std::vector<at::Tensor> DoraUpdate::backward(const at::Tensor& g_NO, const at::Tensor& x_NI, const Matrix& w,
                                             const std::vector<at::Tensor>& saved, bool needs_dx,
                                             at::Tensor& dx_NI) const {
  const at::Tensor h_NO = scale_columns(g_NO, s_.gamma_O);
  LowRankGradients grads = low_rank_gradients(f_, h_NO, dropout(x_NI, f_.dropout), saved[0]);
  grads.leaves.push_back(column_dots(g_NO, saved[1], s_.gamma_O.scalar_type()).mul_(s_.inverse_norm_O));
  if (!needs_dx) return std::move(grads.leaves);
  const at::Tensor w_OI = w.dense_OI();
  if (f_.dropout.active()) {
    add_product(dx_NI, g_NO, w_OI);
    at::Tensor behind_NI = at::mm(scale_columns(g_NO, s_.gamma_O - 1), w_OI);
    dx_NI.add_(dropout(behind_NI.addmm_(grads.du_NR, f_.a_RI.value), f_.dropout));
  } else {
    add_product(dx_NI, h_NO, w_OI);
    dx_NI.addmm_(grads.du_NR, f_.a_RI.value);
  }
  return std::move(grads.leaves);
}

at::Tensor squared_row_norms(const at::Tensor& w_OI, at::ScalarType dtype) {
  return at::linalg_vector_norm(w_OI, 2, {1}, false, dtype).square_();
}

at::Tensor squared_row_norms(const at::Tensor& base_square_O, const at::Tensor& w_OI, const LowRank& f) {
  const auto dtype = base_square_O.scalar_type();
  const at::Tensor a_RI = f.a_RI.value.to(dtype), b_OR = f.b_OR.value.to(dtype);
  const at::Tensor cross_OR = matmul_to(w_OI, f.a_RI.value.t(), dtype).mul_(2 * f.scale);
  const at::Tensor own_OR = at::mm(b_OR, at::mm(a_RI, a_RI.t())).mul_(f.scale * f.scale);
  return base_square_O + (b_OR * (cross_OR + own_OR)).sum(1);
}

at::Tensor squared_row_norms_reference(const at::Tensor& w_OI, const LowRank& f) {
  return (w_OI + at::mm(f.b_OR.value, f.a_RI.value) * f.scale).square().sum(1);
}

}  // namespace corank::ops
