#pragma once
#include <memory>
#include <vector>

#include "trainer/layers/update.h"
#include "trainer/ops/weight.h"

// Legend: N tokens, I in, O out.
namespace corank {

/// One linear that reads the common input: y = x W^T + bias, with W as `update` makes it.
struct Projection {
  const Matrix* matrix = nullptr;        ///< borrowed until backward is done
  at::Tensor matrix_leaf;                ///< defined where W itself trains (full fine-tuning): its gradient is formed
  ops::Weight bias_O;                    ///< may be undefined
  std::shared_ptr<const Update> update;  ///< may be null
  TrainedShare* matrix_share = nullptr;  ///< how ranks share such a W; null: the leaf is all of it
};

/// Outputs [N, O_i] of every projection of x_NI. One node for all of them, so that x is kept once and its gradient is
/// formed in one buffer: dx = sum_i g_i W_i and what the updates add. Gradients of what trains go to the leaves
/// themselves (ops::add_gradient). Kept for backward: x (only where something
/// trains) and what the updates save; never a [O, I] tensor.
std::vector<at::Tensor> project(const at::Tensor& x_NI, std::vector<Projection> projections);

}  // namespace corank
