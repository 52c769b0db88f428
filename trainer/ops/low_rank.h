#pragma once
#include "trainer/ops/dropout.h"
#include "trainer/ops/update.h"

// Legend: N tokens, I in, O out, R rank.
namespace corank::ops {

/// s B diag(e) A, in the compute dtype of the layer; e is 1 where it is undefined.
struct LowRank {
  Weight a_RI;
  Weight b_OR;
  double scale = 1;
  Weight e_R1;
  Dropout dropout;  ///< of the adapter's input
};

/// LoRA (arXiv 2106.09685; methods 2.1) and, with e, AdaLoRA's form (2303.10512; methods 7.1):
/// y = x W^T + s ((drop(x) A^T) e) B^T. Leaves A, B, e. Saved: u = drop(x) A^T [N, R].
/// Backward: t = s g B; dB = s g^T (u e); de = sum over tokens of u t; du = t e; dA = du^T drop(x); dx = g W + mask (du
/// A).
class LowRankUpdate : public Update {
 public:
  explicit LowRankUpdate(LowRank factors) : f_(std::move(factors)) {}
  std::vector<at::Tensor> leaves() const override;
  at::Tensor forward(const at::Tensor& x_NI, const Matrix& w, const at::Tensor& bias_O,
                     std::vector<at::Tensor>& saved) const override;
  std::vector<at::Tensor> backward(const at::Tensor& g_NO, const at::Tensor& x_NI, const Matrix& w,
                                   const std::vector<at::Tensor>& saved, bool needs_dx,
                                   at::Tensor& dx_NI) const override;

 private:
  LowRank f_;
};

/// The three parts of a low-rank backward, for updates that are built on it. `g_NO` reaches the product from behind.
struct LowRankGradients {
  std::vector<at::Tensor> leaves;  ///< of A, B and, where it is defined, e
  at::Tensor du_NR;                ///< of u
};
LowRankGradients low_rank_gradients(const LowRank& f, const at::Tensor& g_NO, const at::Tensor& dropped_x_NI,
                                    const at::Tensor& u_NR);

}  // namespace corank::ops
