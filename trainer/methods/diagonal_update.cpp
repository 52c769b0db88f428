#include "trainer/methods/diagonal_update.h"

namespace corank {

DiagonalUpdate::DiagonalUpdate(const LowRank& f, ops::Weight e_R1)
    : LowRankUpdate({{e_R1.value * f.a_RI.value, f.a_RI.leaf}, f.b_OR, f.scale, f.dropout}),
      a_RI_(f.a_RI),
      e_R1_(std::move(e_R1)) {}

std::vector<at::Tensor> DiagonalUpdate::leaves() const {
  std::vector<at::Tensor> leaves = LowRankUpdate::leaves();
  leaves.push_back(e_R1_.leaf);
  return leaves;
}

void DiagonalUpdate::add_gradients(const at::Tensor& da_RI, const at::Tensor& db_OR) const {
  LowRankUpdate::add_gradients(da_RI * e_R1_.value, db_OR);
  ops::add_gradient(e_R1_.leaf, (da_RI * a_RI_.value).sum(1, /*keepdim=*/true));
}

}  // namespace corank
