#pragma once
#include "trainer/ops/dropout.h"
#include "trainer/ops/weight.h"

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

/// The maps of MoRA and their adjoints; x, y, g, dx are [N, this rank's features]. Compressed rows c, z and their
/// gradients are [N, R], or [N, blocks, R] with `rotate`; on CUDA R is filled up with zeros to a multiple of 8.
at::Tensor mora_compress(const at::Tensor& x_NL, const Mora& s);
void mora_add_decompressed(at::Tensor& y_NL, const at::Tensor& z, const Mora& s);
/// The adjoint of decompressing; `like`: a compressed row of the same pass.
at::Tensor mora_gather(const at::Tensor& g_NL, const at::Tensor& like, const Mora& s);
/// The adjoint of compressing.
void mora_add_expanded(at::Tensor& dx_NL, const at::Tensor& dc, const Mora& s);
/// The matrix with zeros up to the width of compressed rows.
at::Tensor mora_padded(const at::Tensor& m_RR);
/// Each row of c, in all its blocks, through `m`.
at::Tensor mora_through(const at::Tensor& c, const at::Tensor& m);
/// dz^T c in `dtype`.
at::Tensor mora_square_gradient(const at::Tensor& dz, const at::Tensor& c, at::ScalarType dtype);

/// The update as a dense [O, I] matrix, from the index formulas: the twin in tests, and what merging adds.
at::Tensor mora_delta(const at::Tensor& m_RR, Grouping compress, Grouping decompress, int64_t in, int64_t out);

}  // namespace corank::ops
