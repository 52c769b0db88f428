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

/// Adds to the gradient of a leaf, in its dtype: in place, where a store's flat buffer holds it. Backward passes of our
/// own nodes call it and hand autograd nothing.
void add_gradient(const at::Tensor& leaf, const at::Tensor& gradient);

/// torch::autograd::Function takes a tensor that may be undefined only as an optional.
inline std::optional<at::Tensor> if_defined(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
}

}  // namespace corank::ops
