#include "trainer/ops/rope.h"

#include <torch/csrc/autograd/custom_function.h>

#include "trainer/ops/cuda.h"

namespace corank::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Turns by the angle of each position, or back with direction = -1.
at::Tensor rotate(const at::Tensor& x_NHd, const at::Tensor& cos_Td, const at::Tensor& sin_Td,
                  const at::Tensor& positions_N, int direction) {
  if (x_NHd.is_cuda() && cuda::has_kernel(x_NHd)) return cuda::rope(x_NHd, cos_Td, sin_Td, positions_N, direction);
  const at::Tensor cos = cos_Td.index_select(0, positions_N).unsqueeze(1);
  const at::Tensor sin = sin_Td.index_select(0, positions_N).unsqueeze(1).mul_(direction);
  const int64_t half = x_NHd.size(2) / 2;
  const at::Tensor x = x_NHd.to(cos_Td.scalar_type());
  const at::Tensor first = x.narrow(2, 0, half), second = x.narrow(2, half, half);
  return at::cat({first * cos - second * sin, second * cos + first * sin}, 2).to(x_NHd.scalar_type());
}

struct Rope : torch::autograd::Function<Rope> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos,
                               const at::Tensor& sin, const at::Tensor& positions) {
    ctx->save_for_backward({cos, sin, positions});
    return {rotate(q, cos, sin, positions, 1), rotate(k, cos, sin, positions, 1)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list s = ctx->get_saved_variables();
    const auto back = [&](const at::Tensor& g) {
      return g.defined() ? rotate(g.contiguous(), s[0], s[1], s[2], -1) : g;
    };
    return {back(grads[0]), back(grads[1]), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

std::pair<at::Tensor, at::Tensor> rope(const at::Tensor& q_NHd, const at::Tensor& k_NKd, const at::Tensor& cos_Td,
                                       const at::Tensor& sin_Td, const at::Tensor& positions_N) {
  variable_list out = Rope::apply(q_NHd, k_NKd, cos_Td, sin_Td, positions_N);
  return {out[0], out[1]};
}

}  // namespace corank::ops
