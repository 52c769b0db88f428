#pragma once
#include <ATen/ATen.h>

namespace corank::ops {

/// AdamW (arXiv 1711.05101) as torch.optim.AdamW computes it.
struct AdamW {
  double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8;
};

/// A scalar for a learning rate as the kernels read it for parameters like these: on CUDA in float32 on the device, on
/// the CPU in float64.
at::Tensor adamw_learning_rate(const at::Tensor& like);

/// One step in place over flat buffers of one dtype (float32 or float64) and device. `learning_rate`: of
/// adamw_learning_rate(). `step`, from 1, and `skip` are float32 scalars on the buffers' device; where `skip` is 1,
/// nothing changes.
void adamw(const at::Tensor& parameter, const at::Tensor& grad, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
           const at::Tensor& learning_rate, double weight_decay, const at::Tensor& step, const AdamW& options,
           const at::Tensor& skip);

/// The plain formula: the twin of `adamw` in tests.
void adamw_reference(const at::Tensor& parameter, const at::Tensor& grad, const at::Tensor& exp_avg,
                     const at::Tensor& exp_avg_sq, double learning_rate, double weight_decay, int64_t step,
                     const AdamW& options);

}  // namespace corank::ops
