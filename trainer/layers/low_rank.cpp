#include "trainer/layers/low_rank.h"

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
  const at::Tensor u_NR = at::mm(ops::dropout(x_NI, f_.dropout), f_.a_RI.value.t());
  saved.push_back(u_NR);
  return w.multiply(x_NI, bias_O, {u_NR, f_.b_OR.value.t(), f_.scale});
}

LowRankGradients low_rank_gradients(const LowRank& f, const at::Tensor& g_NO, const at::Tensor& dropped_x_NI,
                                    const at::Tensor& gu_OR) {
  const int64_t rank = f.a_RI.leaf.size(0);
  const at::Tensor du_NR = at::mm(g_NO, f.b_OR.value).mul_(f.scale);
  const at::Tensor da_RI = ops::matmul_to(du_NR.t(), dropped_x_NI, f.a_RI.leaf.scalar_type());
  return {da_RI.narrow(0, 0, rank), gu_OR.narrow(1, 0, rank) * f.scale, du_NR};
}

void LowRankUpdate::backward(const at::Tensor& g_NO, const at::Tensor& x_NI, const Matrix& w,
                             const std::vector<at::Tensor>& saved, const InputGradient& dx) const {
  const at::Tensor gu_OR = ops::matmul_to(g_NO.t(), saved[0], f_.b_OR.leaf.scalar_type());
  const LowRankGradients grads = low_rank_gradients(f_, g_NO, ops::dropout(x_NI, f_.dropout), gu_OR);
  add_gradients(grads.da_RI, grads.db_OR);
  if (!dx.needed()) return;
  if (!f_.dropout.active()) return w.multiply_transposed(g_NO, dx.dx_NI, dx.write, {grads.du_NR, f_.a_RI.value});
  w.multiply_transposed(g_NO, dx.dx_NI, dx.write);
  dx.dx_NI.add_(ops::dropout(at::mm(grads.du_NR, f_.a_RI.value), f_.dropout));
}

void LowRankUpdate::add_gradients(const at::Tensor& da_RI, const at::Tensor& db_OR) const {
  ops::add_gradient(f_.a_RI.leaf, da_RI);
  ops::add_gradient(f_.b_OR.leaf, db_OR);
}

}  // namespace corank
