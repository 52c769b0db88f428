#include "trainer/ops/rms_norm.h"

#include <torch/csrc/autograd/custom_function.h>

#include "trainer/ops/cuda.h"

namespace corank::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::ScalarType statistics_dtype(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

std::pair<at::Tensor, at::Tensor> normalise(const at::Tensor& h, const at::Tensor& weight, double eps) {
  if (h.is_cuda() && cuda::has_kernel(h)) return cuda::rms_norm_forward(h, weight, eps);
  const at::Tensor wide = h.to(statistics_dtype(h));
  at::Tensor rstd_N1 = wide.square().mean(-1, /*keepdim=*/true).add_(eps).rsqrt_();
  return {(wide * rstd_N1).to(h.scalar_type()).mul_(weight), rstd_N1};
}

/// dh = rstd (g w - x^ mean(g w x^)), dw = sum_N g x^, with x^ = h rstd.
at::Tensor normalise_backward(const at::Tensor& grad, const at::Tensor& h, const at::Tensor& rstd_N1,
                              const at::Tensor& weight, const at::Tensor& leaf) {
  if (h.is_cuda() && cuda::has_kernel(h) && !leaf.defined()) return cuda::rms_norm_backward(grad, h, rstd_N1, weight);
  const at::Tensor g = grad.to(statistics_dtype(h));
  const at::Tensor normed = h.to(statistics_dtype(h)) * rstd_N1;
  if (leaf.defined()) add_gradient(leaf, (g * normed).sum(0).to(leaf.scalar_type()));
  const at::Tensor gw = g * weight;
  return (gw - normed * (gw * normed).mean(-1, /*keepdim=*/true)).mul_(rstd_N1).to(h.scalar_type());
}

struct AddRmsNorm : torch::autograd::Function<AddRmsNorm> {
  /// Returns {y}, and {y, h} where there is a delta.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& residual, const std::optional<at::Tensor>& delta,
                               const std::optional<at::Tensor>& leaf, const at::Tensor& weight, double eps) {
    const at::Tensor h = delta ? residual + *delta : residual;
    auto [y, rstd_N1] = normalise(h, weight, eps);
    ctx->save_for_backward({h, rstd_N1, weight, leaf.value_or(at::Tensor())});
    ctx->saved_data["has_delta"] = delta.has_value();
    return delta ? variable_list{y, h} : variable_list{y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const bool has_delta = ctx->saved_data["has_delta"].toBool();
    at::Tensor grad_h = has_delta ? grads[1] : at::Tensor();
    if (grads[0].defined()) {
      const at::Tensor through = normalise_backward(grads[0].contiguous(), saved[0], saved[1], saved[2], saved[3]);
      grad_h = grad_h.defined() ? through + grad_h : through;
    }
    return {grad_h, has_delta ? grad_h : at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

std::pair<at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& residual_ND, const at::Tensor& delta_ND,
                                               const Weight& weight_D, double eps) {
  const variable_list out =
      AddRmsNorm::apply(residual_ND, if_defined(delta_ND), if_defined(weight_D.leaf), weight_D.value, eps);
  return {delta_ND.defined() ? out[1] : residual_ND, out[0]};
}

at::Tensor rms_norm(const at::Tensor& x, const Weight& weight_D, double eps) {
  const at::Tensor rows = x.reshape({-1, x.size(-1)});
  return add_rms_norm(rows, at::Tensor(), weight_D, eps).second.view(x.sizes());
}

}  // namespace corank::ops
