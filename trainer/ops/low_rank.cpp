#include "trainer/ops/low_rank.h"

namespace corank::ops {
namespace {

at::Tensor scaled_by_e(const at::Tensor& u_NR, const LowRank& f) {
  return f.e_R1.defined() ? u_NR * f.e_R1.value.view({-1}) : u_NR;
}

}  // namespace

std::vector<at::Tensor> LowRankUpdate::leaves() const {
  std::vector<at::Tensor> leaves{f_.a_RI.leaf, f_.b_OR.leaf};
  if (f_.e_R1.defined()) leaves.push_back(f_.e_R1.leaf);
  return leaves;
}

at::Tensor LowRankUpdate::forward(const at::Tensor& x_NI, const Matrix& w, const at::Tensor& bias_O,
                                  std::vector<at::Tensor>& saved) const {
  at::Tensor y_NO = affine(x_NI, w.dense_OI(), bias_O);
  const at::Tensor u_NR = at::mm(dropout(x_NI, f_.dropout), f_.a_RI.value.t());
  saved.push_back(u_NR);
  return y_NO.addmm_(scaled_by_e(u_NR, f_), f_.b_OR.value.t(), /*beta=*/1, /*alpha=*/f_.scale);
}

LowRankGradients low_rank_gradients(const LowRank& f, const at::Tensor& g_NO, const at::Tensor& dropped_x_NI,
                                    const at::Tensor& u_NR) {
  const auto master = f.a_RI.leaf.scalar_type();
  LowRankGradients grads;
  const at::Tensor t_NR = at::mm(g_NO, f.b_OR.value).mul_(f.scale);
  grads.du_NR = scaled_by_e(t_NR, f);
  grads.leaves.push_back(matmul_to(grads.du_NR.t(), dropped_x_NI, master));
  grads.leaves.push_back(matmul_to(g_NO.t(), scaled_by_e(u_NR, f), master).mul_(f.scale));
  if (f.e_R1.defined()) grads.leaves.push_back((u_NR.to(master) * t_NR.to(master)).sum(0).view({-1, 1}));
  return grads;
}

std::vector<at::Tensor> LowRankUpdate::backward(const at::Tensor& g_NO, const at::Tensor& x_NI, const Matrix& w,
                                                const std::vector<at::Tensor>& saved, bool needs_dx,
                                                at::Tensor& dx_NI) const {
  LowRankGradients grads = low_rank_gradients(f_, g_NO, dropout(x_NI, f_.dropout), saved[0]);
  if (!needs_dx) return std::move(grads.leaves);
  add_product(dx_NI, g_NO, w.dense_OI());
  if (f_.dropout.active()) {
    dx_NI.add_(dropout(at::mm(grads.du_NR, f_.a_RI.value), f_.dropout));
  } else {
    dx_NI.addmm_(grads.du_NR, f_.a_RI.value);
  }
  return std::move(grads.leaves);
}

}  // namespace corank::ops
