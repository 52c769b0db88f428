#include "trainer/methods/dora_update.h"

#include <algorithm>

#include "trainer/ops/cuda.h"
#include "trainer/ops/matmul.h"

namespace corank {
namespace {

constexpr size_t kBatchBytes = size_t{32} << 20;  // of dense weights

/// x times one number a column, in the higher precision of the two, rounded once to x's dtype.
at::Tensor scale_columns(const at::Tensor& x_NO, const at::Tensor& factor_O) {
  at::Tensor y_NO = at::empty_like(x_NO);
  return at::mul_out(y_NO, x_NO, factor_O);
}

/// q = gamma (q + s u B^T), in place.
void scaled_sum(at::Tensor& q_NO, const at::Tensor& u_NR, const LowRank& f, const at::Tensor& gamma_O) {
  if (ops::cuda::on_matrix_units(q_NO)) {
    return ops::cuda::scaled_low_rank_sum(q_NO, u_NR, f.b_OR.value, f.scale, gamma_O);
  }
  q_NO.addmm_(u_NR, f.b_OR.value.t(), /*beta=*/1, /*alpha=*/f.scale);
  at::mul_out(q_NO, q_NO, gamma_O);
}

struct Behind {
  at::Tensor h_NO;   ///< gamma g
  at::Tensor dm_O;   ///< factor times the sum over tokens of g z
  at::Tensor hu_OR;  ///< h^T u
};

Behind behind(const at::Tensor& g_NO, const at::Tensor& z_NO, const at::Tensor& u_NR, const at::Tensor& gamma_O,
              const at::Tensor& factor_O) {
  if (ops::cuda::on_matrix_units(g_NO)) {
    const auto [h_NO, dm_O, hu_OR] = ops::cuda::dora_gradients(g_NO, z_NO, u_NR, gamma_O, factor_O);
    return {h_NO, dm_O, hu_OR};
  }
  const auto master = gamma_O.scalar_type();
  const at::Tensor h_NO = scale_columns(g_NO, gamma_O);
  return {h_NO, (g_NO.to(master) * z_NO).sum(0).mul_(factor_O), ops::matmul_to(h_NO.t(), u_NR, master)};
}

/// Several small linears in one launch, which alone would not fill a GPU.
at::Tensor squared_row_norms_in_batches(const std::vector<const Matrix*>& weights,
                                        const std::vector<LowRank>& factors) {
  const auto dense_bytes = 2 * static_cast<size_t>(factors[0].b_OR.value.size(0) * factors[0].a_RI.value.size(1));
  const size_t batch = std::clamp(kBatchBytes / dense_bytes, size_t{1}, ops::cuda::kMostRowNorms);
  std::vector<at::Tensor> squares, w, a, b;
  for (size_t i = 0; i < weights.size(); ++i) {
    const LowRank f = aligned(factors[i]);
    w.push_back(weights[i]->dense_OI());
    a.push_back(f.a_RI.value);
    b.push_back(f.b_OR.value);
    if (w.size() < batch && i + 1 < weights.size()) continue;
    squares.push_back(ops::cuda::squared_row_norms(w, a, b, f.scale));
    for (auto* batched : {&w, &a, &b}) batched->clear();
  }
  return at::cat(squares);
}

}  // namespace

std::vector<at::Tensor> DoraUpdate::leaves() const { return {f_.a_RI.leaf, f_.b_OR.leaf, s_.magnitude_leaf_O}; }

at::Tensor DoraUpdate::forward(const at::Tensor& x_NI, const Matrix& w, const at::Tensor& bias_O,
                               std::vector<at::Tensor>& saved) const {
  const at::Tensor dropped_NI = ops::dropout(x_NI, f_.dropout);
  const at::Tensor u_NR = at::mm(dropped_NI, f_.a_RI.value.t());
  saved.push_back(u_NR);
  if (!f_.dropout.active()) {
    at::Tensor q_NO = w.multiply(x_NI, {});
    scaled_sum(q_NO, u_NR, f_, s_.gamma_O);
    saved.push_back(q_NO);
    return bias_O.defined() ? q_NO + bias_O : s_.overwritten ? q_NO.clone() : q_NO;
  }
  const auto twice = w.unpacked(Pass::forward);
  at::Tensor q_NO = twice->multiply(dropped_NI, {}), y_NO = twice->multiply(x_NI, {});
  const at::Tensor low_NO = at::mm(u_NR, f_.b_OR.value.t()).mul_(f_.scale);
  y_NO.add_(scale_columns(q_NO, s_.gamma_O - 1)).add_(scale_columns(low_NO, s_.gamma_O));
  saved.push_back(q_NO.add_(low_NO));
  return bias_O.defined() ? y_NO.add_(bias_O) : y_NO;
}

void DoraUpdate::backward(const at::Tensor& g_NO, const at::Tensor& x_NI, const Matrix& w,
                          const std::vector<at::Tensor>& saved, const InputGradient& dx) const {
  const bool dropped = f_.dropout.active();
  const auto [h_NO, dm_O, hu_OR] =
      behind(g_NO, saved[1], saved[0], s_.gamma_O, dropped ? s_.inverse_norm_O : s_.inverse_magnitude_O);
  const LowRankGradients grads = low_rank_gradients(f_, h_NO, ops::dropout(x_NI, f_.dropout), hu_OR);
  ops::add_gradient(f_.a_RI.leaf, grads.da_RI);
  ops::add_gradient(f_.b_OR.leaf, grads.db_OR);
  ops::add_gradient(s_.magnitude_leaf_O, dm_O);
  if (!dx.needed()) return;
  const LowRankTerm through_a{grads.du_NR, f_.a_RI.value};
  if (!dropped) return w.multiply_transposed(h_NO, dx.dx_NI, dx.write, through_a);
  const auto twice = w.unpacked(Pass::backward);
  twice->multiply_transposed(g_NO, dx.dx_NI, dx.write);
  const at::Tensor behind_NI = at::empty_like(dx.dx_NI);
  twice->multiply_transposed(scale_columns(g_NO, s_.gamma_O - 1), behind_NI, Write::over, through_a);
  dx.dx_NI.add_(ops::dropout(behind_NI, f_.dropout));
}

at::Tensor squared_row_norms(const at::Tensor& w_OI, at::ScalarType dtype) {
  return at::linalg_vector_norm(w_OI, 2, {1}, false, dtype).square_();
}

at::Tensor squared_row_norms(const at::Tensor& base_squares_MO, const std::vector<const Matrix*>& weights,
                             const std::vector<LowRank>& factors) {
  if (ops::cuda::on_matrix_units(factors.front().a_RI.value) && factors.front().a_RI.value.size(1) % 8 == 0) {
    return squared_row_norms_in_batches(weights, factors);
  }
  const auto dtype = base_squares_MO.scalar_type();
  const double s = factors.front().scale;
  std::vector<at::Tensor> a, b, cross;
  for (size_t i = 0; i < factors.size(); ++i) {
    a.push_back(factors[i].a_RI.value);
    b.push_back(factors[i].b_OR.value);
    cross.push_back(ops::matmul_to(weights[i]->dense_OI(), a.back().t(), dtype));
  }
  const at::Tensor a_MRI = at::stack(a).to(dtype), b_MOR = at::stack(b).to(dtype);
  const at::Tensor own_MOR = at::bmm(b_MOR, at::bmm(a_MRI, a_MRI.transpose(1, 2)));
  const at::Tensor inner_MOR = at::stack(cross).mul_(2 * s).add_(own_MOR, s * s);
  return base_squares_MO + (b_MOR * inner_MOR).sum(2);
}

at::Tensor squared_row_norms_reference(const at::Tensor& w_OI, const LowRank& f) {
  return (w_OI + at::mm(f.b_OR.value, f.a_RI.value) * f.scale).square().sum(1);
}

}  // namespace corank
