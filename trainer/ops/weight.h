#pragma once
#include <ATen/ATen.h>

#include <optional>

namespace corank::ops {

/// A model tensor: what the arithmetic reads, and the leaf that its gradient goes to. Frozen: `leaf` is undefined, and
/// no gradient is formed. Trainable: `leaf` is the float32 (tests: float64) master with requires_grad, `value` the same
/// numbers in the compute dtype (the same storage when the dtypes agree), without requires_grad.
struct Weight {
  at::Tensor value;
  at::Tensor leaf;

  bool defined() const { return value.defined(); }
  bool trains() const { return leaf.defined(); }
};

/// torch::autograd::Function takes a tensor that may be undefined only as an optional.
inline std::optional<at::Tensor> if_defined(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
}

/// A [O, I] matrix that can show itself in the compute dtype. Quantised formats build the dense form on each call, in
/// forward and again in backward, so that nothing of size [O, I] is kept between them.
class Matrix {
 public:
  virtual ~Matrix() = default;
  virtual at::Tensor dense_OI() const = 0;
};

/// a @ b with the result in `dtype`, accumulated and rounded once where the device can (CUDA: bfloat16 -> float32).
at::Tensor matmul_to(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype);

}  // namespace corank::ops
