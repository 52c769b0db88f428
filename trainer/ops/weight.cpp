#include "trainer/ops/weight.h"

namespace corank::ops {

void add_gradient(const at::Tensor& leaf, const at::Tensor& gradient) {
  if (leaf.grad().defined()) {
    leaf.grad().add_(gradient);
  } else {
    leaf.mutable_grad() = gradient;
  }
}

}  // namespace corank::ops
