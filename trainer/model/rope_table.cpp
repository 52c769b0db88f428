#include "trainer/model/rope_table.h"

#include <cmath>
#include <numbers>

namespace corank {
namespace {

double scaled(double frequency, const RopeConfig& c) {
  if (c.scaling == RopeConfig::Scaling::none) return frequency;
  if (c.scaling == RopeConfig::Scaling::linear) return frequency / c.factor;
  const double wavelength = 2 * std::numbers::pi / frequency;
  const double original = static_cast<double>(c.original_max_positions);
  if (wavelength > original / c.low_frequency_factor) return frequency / c.factor;
  if (wavelength < original / c.high_frequency_factor) return frequency;
  const double smooth =
      (original / wavelength - c.low_frequency_factor) / (c.high_frequency_factor - c.low_frequency_factor);
  return (1 - smooth) * frequency / c.factor + smooth * frequency;
}

}  // namespace

std::pair<at::Tensor, at::Tensor> rope_table(const RopeConfig& config, int64_t head_dim, int64_t positions,
                                             at::ScalarType dtype, at::Device device) {
  at::Tensor frequencies = at::empty({head_dim / 2}, at::TensorOptions(at::kDouble));
  for (int64_t i = 0; i < head_dim / 2; ++i) {
    frequencies[i] =
        scaled(std::pow(config.theta, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim)), config);
  }
  const at::Tensor angles = at::outer(at::arange(positions, at::TensorOptions(at::kDouble)), frequencies);
  return {angles.cos().to(device, dtype), angles.sin().to(device, dtype)};
}

}  // namespace corank
