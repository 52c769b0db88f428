#include "trainer/ops/adamw.h"

#include <cmath>

namespace corank::ops {

void adamw(const at::Tensor& parameter, const at::Tensor& grad, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
           double learning_rate, double weight_decay, int64_t step, const AdamW& options) {
  if (parameter.numel() == 0) return;
  const at::Tensor step_count = at::full({}, static_cast<double>(step), parameter.options().dtype(at::kFloat));
  at::_fused_adamw_(parameter, grad, exp_avg, exp_avg_sq, {}, step_count, learning_rate, options.beta1, options.beta2,
                    weight_decay, options.epsilon, /*amsgrad=*/false, /*maximize=*/false);
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
