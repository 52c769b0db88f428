#include "trainer/ops/layer_norm.h"

#include <torch/csrc/autograd/custom_function.h>

#include <array>

#include "trainer/ops/wide.h"

namespace corank::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// As ATen's kernel may take it: on the CPU it would round the statistics of bfloat16 rows to bfloat16.
at::Tensor for_kernel(const at::Tensor& x) { return x.is_cuda() ? x : wide(x); }

struct AddLayerNorm : torch::autograd::Function<AddLayerNorm> {
  /// Returns {y}, and {y, h} where there is a delta.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& residual, const std::optional<at::Tensor>& delta,
                               const std::optional<at::Tensor>& weight_leaf, const std::optional<at::Tensor>& bias_leaf,
                               const at::Tensor& weight, const at::Tensor& bias, double eps) {
    const at::Tensor h = delta ? residual + *delta : residual;
    auto [y, mean, rstd] =
        at::native_layer_norm(for_kernel(h), {h.size(-1)}, for_kernel(weight), for_kernel(bias), eps);
    ctx->save_for_backward(
        {h, mean, rstd, weight, bias, weight_leaf.value_or(at::Tensor()), bias_leaf.value_or(at::Tensor())});
    ctx->saved_data["has_delta"] = delta.has_value();
    y = y.to(h.scalar_type());
    return delta ? variable_list{y, h} : variable_list{y};
  }

  /// dw = sum_N g x^ and db = sum_N g with x^ = (h - mean) rstd, summed in float32 whatever the dtype of the run.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list s = ctx->get_saved_variables();
    const at::Tensor &h = s[0], &mean = s[1], &rstd = s[2], &leaf = s[5];
    const bool has_delta = ctx->saved_data["has_delta"].toBool();
    at::Tensor grad_h = has_delta ? grads[1] : at::Tensor();
    if (grads[0].defined()) {
      const at::Tensor g = grads[0].contiguous();
      const auto [through, unused_weight, unused_bias] =
          at::native_layer_norm_backward(for_kernel(g), for_kernel(h), {h.size(-1)}, mean, rstd, for_kernel(s[3]),
                                         for_kernel(s[4]), std::array<bool, 3>{true, false, false});
      const at::Tensor dh = through.to(h.scalar_type());
      grad_h = grad_h.defined() ? dh + grad_h : dh;
      if (leaf.defined()) {
        add_gradient(leaf, (wide(g) * ((wide(h) - mean) * rstd)).sum(0).to(leaf.scalar_type()));
        add_gradient(s[6], wide(g).sum(0).to(leaf.scalar_type()));
      }
    }
    variable_list result(7);
    result[0] = grad_h;
    if (has_delta) result[1] = grad_h;
    return result;
  }
};

}  // namespace

std::pair<at::Tensor, at::Tensor> add_layer_norm(const at::Tensor& residual_ND, const at::Tensor& delta_ND,
                                                 const Weight& weight_D, const Weight& bias_D, double eps) {
  TORCH_CHECK(weight_D.trains() == bias_D.trains(), "add_layer_norm: weight and bias train together");
  const variable_list out = AddLayerNorm::apply(residual_ND, if_defined(delta_ND), if_defined(weight_D.leaf),
                                                if_defined(bias_D.leaf), weight_D.value, bias_D.value, eps);
  return {delta_ND.defined() ? out[1] : residual_ND, out[0]};
}

}  // namespace corank::ops
