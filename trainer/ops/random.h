#pragma once
#include <ATen/ATen.h>

#include <cstdint>
#include <string_view>

/// Counter-based random numbers (Philox 4x32-10, Salmon et al., SC 2011): a draw is a pure function of (key, counter),
/// so results depend on what is drawn, never on ranks, devices or order.
namespace corank::ops {

/// A 64-bit key from a seed and a path of names and numbers, e.g. key_of(seed, "init", parameter_name).
uint64_t key_of(uint64_t seed, std::string_view purpose, std::string_view name, uint64_t number = 0);

/// Fills `out` (float32, float64 or bfloat16, CPU or CUDA, any stride), which is the block that starts at `offset` of a
/// tensor of shape `global`. An element's draw depends on the key and on its row-major index in that tensor alone.
/// Uniform in [low, high).
void fill_uniform(const at::Tensor& out, uint64_t key, double low, double high, at::IntArrayRef global,
                  at::IntArrayRef offset);
/// The same with N(mean, std^2) (Box-Muller).
void fill_normal(const at::Tensor& out, uint64_t key, double mean, double std, at::IntArrayRef global,
                 at::IntArrayRef offset);

}  // namespace corank::ops
