#pragma once
#include <ATen/ATen.h>

namespace corank::ops {

/// AdamW (arXiv 1711.05101) as torch.optim.AdamW computes it.
struct AdamW {
  double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8;
};

/// One step in place over flat buffers of one dtype (float32 or float64) and device. `step` counts from 1.
void adamw(const at::Tensor& parameter, const at::Tensor& grad, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
           double learning_rate, double weight_decay, int64_t step, const AdamW& options);

/// The plain formula: the twin of `adamw` in tests.
void adamw_reference(const at::Tensor& parameter, const at::Tensor& grad, const at::Tensor& exp_avg,
                     const at::Tensor& exp_avg_sq, double learning_rate, double weight_decay, int64_t step,
                     const AdamW& options);

}  // namespace corank::ops
