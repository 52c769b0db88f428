#pragma once
#include <vector>

#include "trainer/weights/matrix.h"

// Legend: N tokens, I in, O out.
namespace corank {

struct LowRank;

/// dL/dx of an input, which the linears that read it form together, one after the other.
struct InputGradient {
  at::Tensor dx_NI;  ///< undefined where nobody needs it
  Write write = Write::over;

  bool needed() const { return dx_NI.defined(); }
};

/// The trainable part of one linear, as plain arithmetic: `project` calls it in forward and in backward, and autograd
/// sees nothing of it. Made for one forward pass; immutable.
class Update {
 public:
  virtual ~Update() = default;
  /// The masters that receive gradients.
  virtual std::vector<at::Tensor> leaves() const = 0;
  /// The factors, where the updated weight is W + s B A and nothing else; null otherwise.
  virtual const LowRank* factors() const { return nullptr; }
  /// y [N, O] of the updated linear, plus `bias_O` (may be undefined). Appends to `saved` what backward needs beside x.
  virtual at::Tensor forward(const at::Tensor& x_NI, const Matrix& w, const at::Tensor& bias_O,
                             std::vector<at::Tensor>& saved) const = 0;
  /// From g = dL/dy: adds to each leaf's gradient (ops::add_gradient), and forms the linear's part of `dx` where that
  /// is needed.
  virtual void backward(const at::Tensor& g_NO, const at::Tensor& x_NI, const Matrix& w,
                        const std::vector<at::Tensor>& saved, const InputGradient& dx) const = 0;
};

}  // namespace corank
