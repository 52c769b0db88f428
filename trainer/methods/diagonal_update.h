#pragma once
#include "trainer/layers/low_rank.h"

namespace corank {

/// s B diag(e) A, AdaLoRA's form (arXiv 2303.10512; methods 7.1): LoRA whose first factor is diag(e) A. Leaves A, B, e.
/// With G the gradient of that factor: dA = e G, de = row sums of G A.
class DiagonalUpdate : public LowRankUpdate {
 public:
  DiagonalUpdate(const LowRank& factors, ops::Weight e_R1);
  std::vector<at::Tensor> leaves() const override;

 protected:
  void add_gradients(const at::Tensor& da_RI, const at::Tensor& db_OR) const override;

 private:
  ops::Weight a_RI_, e_R1_;
};

}  // namespace corank
