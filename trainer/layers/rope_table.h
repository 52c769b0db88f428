#pragma once
#include <ATen/ATen.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace corank {

/// Rotary frequencies, scaled as transformers' rope_type of the same name does it.
/// `linear`: all are slowed by `factor`.
/// `dynamic`: as they are, up to most_positions; beyond them they would depend on the longest sequence of a batch.
/// `llama3`, piecewise: wavelengths longer than original / low are slowed by `factor`, shorter than original / high
/// kept, between them interpolated.
/// `yarn` (arXiv 2309.00071): those that turn less than beta_slow times within the original length are slowed by
/// `factor`, those that turn more than beta_fast times kept, between them a ramp; cos and sin are multiplied by
/// attention_factor.
struct RopeConfig {
  enum class Scaling { none, linear, dynamic, llama3, yarn };
  double theta = 10000;
  Scaling scaling = Scaling::none;
  double factor = 1;
  double original_max_positions = 0;                           ///< llama3, yarn: the length of pretraining
  double low_frequency_factor = 1, high_frequency_factor = 4;  ///< llama3
  double beta_fast = 32, beta_slow = 1;                        ///< yarn
  bool truncate = true;                                        ///< yarn: the ramp begins and ends at whole features
  double attention_factor = 1;                                 ///< yarn
  int64_t most_positions = 0;                                  ///< dynamic; 0: any number
};

/// Of each pair of features, in radians a position: head_dim / 2.
std::vector<double> rope_frequencies(const RopeConfig& config, int64_t head_dim);

/// cos and sin by position, times attention_factor: [positions, head_dim / 2] in `dtype` (float32, float64).
std::pair<at::Tensor, at::Tensor> rope_table(const RopeConfig& config, int64_t head_dim, int64_t positions,
                                             at::ScalarType dtype, at::Device device);

}  // namespace corank
