#include "trainer/methods/low_rank_update.h"

#include "trainer/ops/cuda.h"
#include "trainer/ops/matmul.h"

namespace corank {

LowRank padded(LowRank f, int64_t multiple) {
  const int64_t missing = (multiple - f.a_RI.value.size(0) % multiple) % multiple;
  if (missing == 0) return f;
  f.a_RI.value = at::constant_pad_nd(f.a_RI.value, {0, 0, 0, missing});
  f.b_OR.value = at::constant_pad_nd(f.b_OR.value, {0, missing});
  return f;
}

LowRank aligned(LowRank f) { return ops::cuda::on_matrix_units(f.a_RI.value) ? padded(std::move(f), 8) : f; }

LowRankUpdate::LowRankUpdate(LowRank factors) : f_(aligned(std::move(factors))) {}

std::vector<at::Tensor> LowRankUpdate::leaves() const { return {f_.a_RI.leaf, f_.b_OR.leaf}; }

at::Tensor LowRankUpdate::forward(const at::Tensor& x_NI, const Matrix& w, const at::Tensor& bias_O,
                                  std::vector<at::Tensor>& saved) const {
  at::Tensor y_NO = ops::affine(x_NI, w.dense_OI(), bias_O);
  const at::Tensor u_NR = at::mm(ops::dropout(x_NI, f_.dropout), f_.a_RI.value.t());
  saved.push_back(u_NR);
  return y_NO.addmm_(u_NR, f_.b_OR.value.t(), /*beta=*/1, /*alpha=*/f_.scale);
}

LowRankGradients low_rank_gradients(const LowRank& f, const at::Tensor& g_NO, const at::Tensor& dropped_x_NI,
                                    const at::Tensor& gu_OR) {
  const int64_t rank = f.a_RI.leaf.size(0);
  LowRankGradients grads;
  grads.du_NR = at::mm(g_NO, f.b_OR.value).mul_(f.scale);
  grads.leaves.push_back(ops::matmul_to(grads.du_NR.t(), dropped_x_NI, f.a_RI.leaf.scalar_type()).narrow(0, 0, rank));
  grads.leaves.push_back(gu_OR.narrow(1, 0, rank) * f.scale);
  return grads;
}

std::vector<at::Tensor> LowRankUpdate::backward(const at::Tensor& g_NO, const at::Tensor& x_NI, const Matrix& w,
                                                const std::vector<at::Tensor>& saved, bool needs_dx,
                                                at::Tensor& dx_NI) const {
  const at::Tensor gu_OR = ops::matmul_to(g_NO.t(), saved[0], f_.b_OR.leaf.scalar_type());
  LowRankGradients grads = low_rank_gradients(f_, g_NO, ops::dropout(x_NI, f_.dropout), gu_OR);
  if (!needs_dx) return std::move(grads.leaves);
  ops::add_product(dx_NI, g_NO, w.dense_OI());
  if (f_.dropout.active()) {
    dx_NI.add_(ops::dropout(at::mm(grads.du_NR, f_.a_RI.value), f_.dropout));
  } else {
    dx_NI.addmm_(grads.du_NR, f_.a_RI.value);
  }
  return std::move(grads.leaves);
}

DiagonalUpdate::DiagonalUpdate(const LowRank& f, ops::Weight e_R1)
    : LowRankUpdate({{e_R1.value * f.a_RI.value, f.a_RI.leaf}, f.b_OR, f.scale, f.dropout}),
      a_RI_(f.a_RI),
      e_R1_(std::move(e_R1)) {}

std::vector<at::Tensor> DiagonalUpdate::leaves() const {
  std::vector<at::Tensor> leaves = LowRankUpdate::leaves();
  leaves.push_back(e_R1_.leaf);
  return leaves;
}

std::vector<at::Tensor> DiagonalUpdate::backward(const at::Tensor& g_NO, const at::Tensor& x_NI, const Matrix& w,
                                                 const std::vector<at::Tensor>& saved, bool needs_dx,
                                                 at::Tensor& dx_NI) const {
  std::vector<at::Tensor> grads = LowRankUpdate::backward(g_NO, x_NI, w, saved, needs_dx, dx_NI);
  const at::Tensor of_e_R1 = (grads[0] * a_RI_.value).sum(1, /*keepdim=*/true);
  grads[0] = grads[0] * e_R1_.value;
  grads.push_back(of_e_R1);
  return grads;
}

}  // namespace corank
