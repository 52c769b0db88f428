#include "trainer/ops/adamw.h"

#include <cmath>

namespace corank::ops {

at::Tensor adamw_learning_rate(const at::Tensor& like) {
  return at::zeros({}, at::TensorOptions(like.is_cuda() ? at::kFloat : at::kDouble).device(like.device()));
}

void adamw(const at::Tensor& parameter, const at::Tensor& grad, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
           const at::Tensor& learning_rate, double weight_decay, const at::Tensor& step, const AdamW& options,
           const at::Tensor& skip) {
  if (parameter.numel() == 0) return;
  at::_fused_adamw_(parameter, grad, exp_avg, exp_avg_sq, {}, step, learning_rate, options.beta1, options.beta2,
                    weight_decay, options.epsilon, /*amsgrad=*/false, /*maximize=*/false, /*grad_scale=*/{}, skip);
}

void adamw_reference(const at::Tensor& parameter, const at::Tensor& grad, const at::Tensor& exp_avg,
                     const at::Tensor& exp_avg_sq, double learning_rate, double weight_decay, int64_t step,
                     const AdamW& options) {
  const double correction1 = 1 - std::pow(options.beta1, static_cast<double>(step));
  const double correction2 = 1 - std::pow(options.beta2, static_cast<double>(step));
  parameter.mul_(1 - learning_rate * weight_decay);
  exp_avg.mul_(options.beta1).add_(grad, 1 - options.beta1);
  exp_avg_sq.mul_(options.beta2).addcmul_(grad, grad, 1 - options.beta2);
  const at::Tensor denominator = (exp_avg_sq / correction2).sqrt_().add_(options.epsilon);
  parameter.addcdiv_(exp_avg, denominator, -learning_rate / correction1);
}

}  // namespace corank::ops
