#pragma once
#include <ATen/ATen.h>

#include <memory>

#include "trainer/weights/residency.h"

// Legend: N tokens, I in, O out, R rank.
namespace corank {

/// scale u M, which is added to a product; an undefined u stands for none.
struct LowRankTerm {
  at::Tensor u_NR;
  at::Tensor m_RX;  ///< R by the width of the product
  double scale = 1;
};

/// What becomes of what is there already.
enum class Write { over, add };

/// A [O, I] matrix that multiplies. Products are in the compute dtype, on the matrix's device. A stored format that has
/// no product of its own builds the dense form for each call, in forward and again in backward, so that nothing of size
/// [O, I] is kept between them.
class Matrix {
 public:
  virtual ~Matrix() = default;
  /// x W^T [N, O], plus `bias_O` (may be undefined), plus `term`.
  virtual at::Tensor multiply(const at::Tensor& x_NI, const at::Tensor& bias_O, const LowRankTerm& term = {}) const;
  /// g W, plus `term`, into `dx_NI`.
  virtual void multiply_transposed(const at::Tensor& g_NO, const at::Tensor& dx_NI, Write write,
                                   const LowRankTerm& term = {}) const;
  /// The same matrix for several products in a row: the dense form is built once.
  virtual std::unique_ptr<const Matrix> unpacked(Pass pass) const;
  /// [O, I] in the compute dtype: for merging, norms and tests.
  at::Tensor dense_OI() const { return unpack(Pass::apart); }

 protected:
  /// The dense form, for a product of `pass`.
  virtual at::Tensor unpack(Pass pass) const = 0;
};

/// A tensor as a matrix.
class DenseMatrix : public Matrix {
 public:
  explicit DenseMatrix(at::Tensor w_OI) : w_OI_(std::move(w_OI)) {}

 private:
  at::Tensor unpack(Pass) const override { return w_OI_; }

  at::Tensor w_OI_;
};

}  // namespace corank
