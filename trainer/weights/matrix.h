#pragma once
#include <ATen/ATen.h>

namespace corank {

/// A [O, I] matrix that can show itself in the compute dtype. Quantised formats build the dense form on each call, in
/// forward and again in backward, so that nothing of size [O, I] is kept between them.
class Matrix {
 public:
  virtual ~Matrix() = default;
  virtual at::Tensor dense_OI() const = 0;
};

}  // namespace corank
