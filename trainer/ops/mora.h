#pragma once
#include "trainer/ops/dropout.h"
#include "trainer/ops/update.h"

// Legend: N tokens, I in, O out (full sizes), L this rank's part of them, R side of the square matrix.
namespace corank::ops {

/// How MoRA maps I inputs to R sums and R values to O outputs (arXiv 2405.12130, as the authors' program has it;
/// methods 5.2). `modulo`: feature j belongs to group j mod R; `block`: to one of R runs of neighbours, the first I mod
/// R of them one longer; `rotate`: blocks of R features, block b turned by b times RoPE's angles, each through the same
/// matrix.
enum class Grouping { modulo, block, rotate };

/// Where a rank's features stand among all of them.
struct Extent {
  int64_t size = 0;               ///< of all ranks
  int64_t start = 0, length = 0;  ///< this rank's
};

/// cos and sin [blocks, R / 2] of the angles by which `rotate` turns its blocks.
struct Rotation {
  at::Tensor cos_BH, sin_BH;
};

struct Mora {
  Weight m_RR;
  Grouping compress = Grouping::modulo, decompress = Grouping::modulo;  ///< rotate: both
  Extent in, out;
  Dropout dropout;
  Rotation rotation;  ///< defined for `rotate` only

  int64_t side() const { return m_RR.value.size(0); }
  /// Inputs go through the matrix in so many blocks of R. `rotate` leaves out those that no output reads.
  int64_t blocks() const;
};

/// Tables of a linear of full sizes `in` and `out`, computed in float32 and rounded to the dtype of `options`, as the
/// authors' program has them.
Rotation rotation_of(int64_t r, int64_t in, int64_t out, const at::TensorOptions& options);

/// y = x W^T + decompress(compress(drop(x)) M^T). Leaf M. Saved: the compressed input [N, R] (rotate: [N, blocks, R]).
/// Tensor parallel (methods 10.4): global indices, M replicated, its gradient a partial sum.
class MoraUpdate : public Update {
 public:
  explicit MoraUpdate(Mora square);
  std::vector<at::Tensor> leaves() const override { return {s_.m_RR.leaf}; }
  at::Tensor forward(const at::Tensor& x_NI, const Matrix& w, const at::Tensor& bias_O,
                     std::vector<at::Tensor>& saved) const override;
  std::vector<at::Tensor> backward(const at::Tensor& g_NO, const at::Tensor& x_NI, const Matrix& w,
                                   const std::vector<at::Tensor>& saved, bool needs_dx,
                                   at::Tensor& dx_NI) const override;

 private:
  Mora s_;
  at::Tensor padded_;  ///< the matrix with zeros up to the width of compressed rows
};

/// The update as a dense [O, I] matrix, from the index formulas: the twin in tests, and what merging adds.
at::Tensor mora_delta(const at::Tensor& m_RR, Grouping compress, Grouping decompress, int64_t in, int64_t out);

}  // namespace corank::ops
