#pragma once
#include "trainer/layers/low_rank.h"

// Legend: N tokens, I in, O out, R rank.
namespace corank {

/// W' = diag(m / n) (W + s B A) (DoRA, arXiv 2402.09353; methods 4). n, the row norms of W + s B A, is a constant of
/// the step, as in PEFT: no gradient flows through it.
struct MagnitudeScale {
  at::Tensor magnitude_leaf_O;
  at::Tensor gamma_O;              ///< m / n in the master's dtype: bfloat16 would lose what m learns; never 0
  at::Tensor inverse_norm_O;       ///< 1 / n
  at::Tensor inverse_magnitude_O;  ///< 1 / (gamma n)
  bool overwritten = false;        ///< the caller changes y in place (a sum over tensor ranks): backward keeps a copy
};

/// z = gamma (x W^T + s u B^T), y = z + bias. Leaves A, B, m. Saved: u [N, R], z [N, O]. Backward, h = gamma g:
/// dm = sum over tokens of g z / m, which is g q / n; dA, dB from h as in LoRA; dx = h W + s (h B) A.
/// With dropout the base term reads x and the rest x~ = drop(x) (methods 4.5): y = x W^T + (gamma - 1) (x~ W^T) +
/// gamma s u~ B^T + bias; dx = g W + mask (((gamma - 1) g) W + s (h B) A); saved is q~ = x~ W^T + s u~ B^T.
class DoraUpdate : public Update {
 public:
  DoraUpdate(LowRank factors, MagnitudeScale scale) : f_(aligned(std::move(factors))), s_(std::move(scale)) {}
  std::vector<at::Tensor> leaves() const override;
  at::Tensor forward(const at::Tensor& x_NI, const Matrix& w, const at::Tensor& bias_O,
                     std::vector<at::Tensor>& saved) const override;
  void backward(const at::Tensor& g_NO, const at::Tensor& x_NI, const Matrix& w, const std::vector<at::Tensor>& saved,
                const InputGradient& dx) const override;

 private:
  LowRank f_;
  MagnitudeScale s_;
};

/// Squares of the row norms of W + s B A [M, O] without forming it (methods 4.6), for M linears of one shape, rank and
/// scale: n^2 = |W_j|^2 + 2 s sum_r B (W A^T) + s^2 sum_r (B (A A^T)) B. On blocks of columns: these blocks' parts of
/// the sum. `base_squares_MO`: |W_j|^2 of the same blocks, float32 or float64. One W, or 32 MiB of them,
/// is shown at a time.
at::Tensor squared_row_norms(const at::Tensor& base_squares_MO, const std::vector<const Matrix*>& weights,
                             const std::vector<LowRank>& factors);
/// |W_j|^2 [O] in `dtype`.
at::Tensor squared_row_norms(const at::Tensor& w_OI, at::ScalarType dtype);
/// The plain form of both: the twin in tests.
at::Tensor squared_row_norms_reference(const at::Tensor& w_OI, const LowRank& factors);

}  // namespace corank
