#pragma once
#include "trainer/layers/update.h"
#include "trainer/ops/dropout.h"

// Legend: N tokens, I in, O out, R rank.
namespace corank {

/// s B A, in the compute dtype of the layer.
struct LowRank {
  ops::Weight a_RI;
  ops::Weight b_OR;
  double scale = 1;
  ops::Dropout dropout;  ///< of the adapter's input
};

/// The same product with zeros up to a rank that is a multiple of `multiple`: matrix units of GPUs read rows of 16
/// bytes. Leaves stay as they are.
LowRank padded(LowRank factors, int64_t multiple);

/// LoRA (arXiv 2106.09685; methods 2.1): y = x W^T + s (drop(x) A^T) B^T. Leaves A, B. Saved: u = drop(x) A^T [N, R].
/// Backward: du = s g B; dB = s g^T u; dA = du^T drop(x); dx = g W + mask (du A).
class LowRankUpdate : public Update {
 public:
  explicit LowRankUpdate(LowRank factors);
  std::vector<at::Tensor> leaves() const override;
  at::Tensor forward(const at::Tensor& x_NI, const Matrix& w, const at::Tensor& bias_O,
                     std::vector<at::Tensor>& saved) const override;
  std::vector<at::Tensor> backward(const at::Tensor& g_NO, const at::Tensor& x_NI, const Matrix& w,
                                   const std::vector<at::Tensor>& saved, bool needs_dx,
                                   at::Tensor& dx_NI) const override;

 private:
  LowRank f_;
};

/// s B diag(e) A, AdaLoRA's form (arXiv 2303.10512; methods 7.1): LoRA whose first factor is diag(e) A. Leaves A, B, e.
/// With G the gradient of that factor: dA = e G, de = row sums of G A.
class DiagonalUpdate : public LowRankUpdate {
 public:
  DiagonalUpdate(const LowRank& factors, ops::Weight e_R1);
  std::vector<at::Tensor> leaves() const override;
  std::vector<at::Tensor> backward(const at::Tensor& g_NO, const at::Tensor& x_NI, const Matrix& w,
                                   const std::vector<at::Tensor>& saved, bool needs_dx,
                                   at::Tensor& dx_NI) const override;

 private:
  ops::Weight a_RI_, e_R1_;
};

/// LowRank as the layer's device reads it best.
LowRank aligned(LowRank factors);

/// The two parts of a low-rank backward, for updates that are built on it. `g_NO` reaches the product from behind;
/// `gu_OR` is g^T u in the leaves' dtype.
struct LowRankGradients {
  std::vector<at::Tensor> leaves;  ///< of A and B
  at::Tensor du_NR;                ///< of u
};
LowRankGradients low_rank_gradients(const LowRank& f, const at::Tensor& g_NO, const at::Tensor& dropped_x_NI,
                                    const at::Tensor& gu_OR);

}  // namespace corank
