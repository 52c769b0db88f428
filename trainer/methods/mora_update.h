#pragma once
#include "trainer/layers/update.h"
#include "trainer/ops/mora.h"

// Legend: N tokens, I in, O out (full sizes), R side of the square matrix.
namespace corank {

/// y = x W^T + decompress(compress(drop(x)) M^T). Leaf M. Saved: the compressed input [N, R] (rotate: [N, blocks, R]).
/// Tensor parallel (methods 10.4): global indices, M replicated, its gradient a partial sum.
class MoraUpdate : public Update {
 public:
  explicit MoraUpdate(ops::Mora square);
  std::vector<at::Tensor> leaves() const override { return {s_.m_RR.leaf}; }
  at::Tensor forward(const at::Tensor& x_NI, const Matrix& w, const at::Tensor& bias_O,
                     std::vector<at::Tensor>& saved) const override;
  void backward(const at::Tensor& g_NO, const at::Tensor& x_NI, const Matrix& w, const std::vector<at::Tensor>& saved,
                const InputGradient& dx) const override;

 private:
  ops::Mora s_;
  at::Tensor padded_;  ///< the matrix with zeros up to the width of compressed rows
};

}  // namespace corank
