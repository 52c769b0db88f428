#pragma once
#include <ATen/ATen.h>

#include <cstdint>
#include <utility>

namespace corank {

/// Rotary frequencies. `llama3`: the piecewise scaling of Llama 3.1 (transformers' rope_type "llama3"): wavelengths
/// longer than original / low are slowed by `factor`, shorter than original / high kept, between them interpolated.
/// `linear`: all slowed.
struct RopeConfig {
  enum class Scaling { none, linear, llama3 };
  double theta = 10000;
  Scaling scaling = Scaling::none;
  double factor = 1;
  double low_frequency_factor = 1, high_frequency_factor = 4;
  int64_t original_max_positions = 8192;
};

/// cos and sin by position: [positions, head_dim / 2] in `dtype` (float32, float64).
std::pair<at::Tensor, at::Tensor> rope_table(const RopeConfig& config, int64_t head_dim, int64_t positions,
                                             at::ScalarType dtype, at::Device device);

}  // namespace corank
