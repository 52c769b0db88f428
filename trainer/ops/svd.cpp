#include "trainer/ops/svd.h"

#include <algorithm>

#include "trainer/ops/random.h"

namespace corank::ops {
namespace {

at::Tensor orthonormal(const at::Tensor& m) { return std::get<0>(at::linalg_qr(m)); }

}  // namespace

SingularPart leading_svd(const at::Tensor& w_OI, int64_t rank) {
  const auto [u, s, vt] = at::linalg_svd(w_OI.to(at::kDouble), /*full_matrices=*/false);
  const auto dtype = w_OI.scalar_type();
  return {u.narrow(1, 0, rank).to(dtype), s.narrow(0, 0, rank).to(dtype), vt.narrow(0, 0, rank).t().to(dtype)};
}

SingularPart randomised_svd(const at::Tensor& w_OI, int64_t rank, int64_t iterations, uint64_t key) {
  if (w_OI.size(0) < w_OI.size(1)) {  // the algorithm wants at least as many rows as columns
    const SingularPart turned = randomised_svd(w_OI.t(), rank, iterations, key);
    return {turned.v_IR, turned.s_R, turned.u_OR};
  }
  at::Tensor start_IR = at::empty({w_OI.size(1), rank}, w_OI.options());
  fill_normal(start_IR, key, 0, 1, start_IR.sizes(), {0, 0});
  at::Tensor q_OR = orthonormal(at::mm(w_OI, start_IR));
  for (int64_t i = 0; i < iterations; ++i) q_OR = orthonormal(at::mm(w_OI, orthonormal(at::mm(w_OI.t(), q_OR))));
  const auto [u, s, vt] = at::linalg_svd(at::mm(q_OR.t(), w_OI), /*full_matrices=*/false);
  return {at::mm(q_OR, u), s, vt.t()};
}

SingularPart product_svd(const at::Tensor& b_OR, const at::Tensor& a_RI, int64_t rank) {
  const auto [left_OQ, b_QR] = at::linalg_qr(b_OR.to(at::kDouble));
  const auto [right_IP, a_PR] = at::linalg_qr(a_RI.to(at::kDouble).t());
  const SingularPart inner = leading_svd(at::mm(b_QR, a_PR.t()), std::min({rank, b_QR.size(0), a_PR.size(0)}));
  return {at::mm(left_OQ, inner.u_OR), inner.s_R, at::mm(right_IP, inner.v_IR)};
}

}  // namespace corank::ops
