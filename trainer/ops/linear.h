#pragma once
#include <optional>
#include <vector>

#include "trainer/ops/dropout.h"
#include "trainer/ops/weight.h"

/// Frozen linears with low-rank updates (LoRA, arXiv 2106.09685; methods 2.1). Legend: N tokens, I in, O out, R rank.
namespace corank::ops {

/// s * B A, in the compute dtype of the layer.
struct LowRank {
  Weight a_RI;
  Weight b_OR;
  double scale = 1;
  Dropout dropout;  ///< of the adapter's input
};

/// One linear that reads the common input: y = x W^T + bias + s drop(x) A^T B^T.
struct Projection {
  const Matrix* matrix = nullptr;  ///< borrowed until backward is done
  at::Tensor matrix_leaf;          ///< defined where W itself trains (full fine-tuning): its gradient is formed
  Weight bias_O;                   ///< may be undefined
  std::optional<LowRank> low_rank;
};

/// Outputs [N, O_i] of every projection of x_NI. One node for all of them, so that x is kept once and its gradient is
/// formed in one buffer. Kept for backward: x (only where A or W trains), u = drop(x) A^T [N, R]; never a [O, I]
/// tensor. Backward, g = dL/dy: du = s g B; dB = s g^T u; dA = du^T drop(x); dx = sum_i g_i W_i + mask (du_i A_i).
std::vector<at::Tensor> linear(const at::Tensor& x_NI, std::vector<Projection> projections);

}  // namespace corank::ops
