#pragma once
#include <vector>

#include "trainer/weights/matrix.h"

// Legend: N tokens, I in, O out.
namespace corank {

/// The trainable part of one linear, as plain arithmetic: `project` calls it in forward and in backward, and autograd
/// sees nothing of it. Made for one forward pass; immutable.
class Update {
 public:
  virtual ~Update() = default;
  /// The masters that receive gradients, in the order of what backward() returns.
  virtual std::vector<at::Tensor> leaves() const = 0;
  /// y [N, O] of the updated linear, plus `bias_O` (may be undefined). Appends to `saved` what backward needs beside x.
  virtual at::Tensor forward(const at::Tensor& x_NI, const Matrix& w, const at::Tensor& bias_O,
                             std::vector<at::Tensor>& saved) const = 0;
  /// The gradient of each leaf, in its dtype, from g = dL/dy; adds the linear's part to `dx_NI` (undefined: nothing was
  /// added yet) where `needs_dx`.
  virtual std::vector<at::Tensor> backward(const at::Tensor& g_NO, const at::Tensor& x_NI, const Matrix& w,
                                           const std::vector<at::Tensor>& saved, bool needs_dx,
                                           at::Tensor& dx_NI) const = 0;
};

}  // namespace corank
