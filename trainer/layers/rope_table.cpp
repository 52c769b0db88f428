#include "trainer/layers/rope_table.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace corank {
namespace {

constexpr double kTurn = 2 * std::numbers::pi;

double llama3(double frequency, const RopeConfig& c) {
  const double wavelength = kTurn / frequency;
  if (wavelength > c.original_max_positions / c.low_frequency_factor) return frequency / c.factor;
  if (wavelength < c.original_max_positions / c.high_frequency_factor) return frequency;
  const double smooth = (c.original_max_positions / wavelength - c.low_frequency_factor) /
                        (c.high_frequency_factor - c.low_frequency_factor);
  return (1 - smooth) * frequency / c.factor + smooth * frequency;
}

/// Where yarn's ramp from kept to slowed begins and ends, as numbers of a pair of features.
std::pair<double, double> yarn_ramp(const RopeConfig& c, int64_t head_dim) {
  const auto dim = static_cast<double>(head_dim);
  const auto pair_that_turns = [&](double times) {
    return dim * std::log(c.original_max_positions / (times * kTurn)) / (2 * std::log(c.theta));
  };
  double begin = pair_that_turns(c.beta_fast), end = pair_that_turns(c.beta_slow);
  if (c.truncate) {
    begin = std::floor(begin);
    end = std::ceil(end);
  }
  begin = std::max(begin, 0.0);
  end = std::min(end, dim - 1);
  return {begin, begin == end ? end + 0.001 : end};
}

}  // namespace

std::vector<double> rope_frequencies(const RopeConfig& c, int64_t head_dim) {
  using Scaling = RopeConfig::Scaling;
  const auto [begin, end] = c.scaling == Scaling::yarn ? yarn_ramp(c, head_dim) : std::pair(0.0, 1.0);
  std::vector<double> frequencies;
  for (int64_t i = 0; i < head_dim / 2; ++i) {
    double f = std::pow(c.theta, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
    if (c.scaling == Scaling::linear) f /= c.factor;
    if (c.scaling == Scaling::llama3) f = llama3(f, c);
    if (c.scaling == Scaling::yarn) {
      const double slowed = std::clamp((static_cast<double>(i) - begin) / (end - begin), 0.0, 1.0);
      f = slowed * f / c.factor + (1 - slowed) * f;
    }
    frequencies.push_back(f);
  }
  return frequencies;
}

std::pair<at::Tensor, at::Tensor> rope_table(const RopeConfig& config, int64_t head_dim, int64_t positions,
                                             at::ScalarType dtype, at::Device device) {
  const at::Tensor frequencies = at::tensor(rope_frequencies(config, head_dim), at::TensorOptions(at::kDouble));
  const at::Tensor angles = at::outer(at::arange(positions, at::TensorOptions(at::kDouble)), frequencies);
  return {angles.cos().mul_(config.attention_factor).to(device, dtype),
          angles.sin().mul_(config.attention_factor).to(device, dtype)};
}

}  // namespace corank
