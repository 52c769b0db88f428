#pragma once
#include "trainer/layers/update.h"
#include "trainer/ops/dropout.h"
#include "trainer/ops/weight.h"

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
/// LowRank as the layer's device reads it best.
LowRank aligned(LowRank factors);

/// LoRA (arXiv 2106.09685; methods 2.1): y = x W^T + s (drop(x) A^T) B^T. Leaves A, B. Saved: u = drop(x) A^T [N, R].
/// Backward: du = s g B; dB = s g^T u; dA = du^T drop(x); dx = g W + mask (du A).
class LowRankUpdate : public Update {
 public:
  explicit LowRankUpdate(LowRank factors);
  std::vector<at::Tensor> leaves() const override;
  const LowRank* factors() const override { return &f_; }
  at::Tensor forward(const at::Tensor& x_NI, const Matrix& w, const at::Tensor& bias_O,
                     std::vector<at::Tensor>& saved) const override;
  void backward(const at::Tensor& g_NO, const at::Tensor& x_NI, const Matrix& w, const std::vector<at::Tensor>& saved,
                const InputGradient& dx) const override;

 protected:
  /// Takes the gradients of the factors, in the leaves' dtype, to the leaves.
  virtual void add_gradients(const at::Tensor& da_RI, const at::Tensor& db_OR) const;

 private:
  LowRank f_;
};

/// The parts of a low-rank backward, for updates that are built on it. `g_NO` reaches the product from behind; `gu_OR`
/// is g^T u in the leaves' dtype.
struct LowRankGradients {
  at::Tensor da_RI, db_OR;  ///< in the leaves' dtype
  at::Tensor du_NR;         ///< of u
};
LowRankGradients low_rank_gradients(const LowRank& f, const at::Tensor& g_NO, const at::Tensor& dropped_x_NI,
                                    const at::Tensor& gu_OR);

}  // namespace corank
