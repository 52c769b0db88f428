#pragma once
#include <ATen/ATen.h>

#include <cstdint>

namespace corank::ops {

/// Inverted dropout whose mask is a pure function of what a value is (methods 10.7): key = (seed, layer, optimizer
/// step), counter = (token's slot in the global batch, global feature). The same mask for every layout and when
/// recomputed.
struct Dropout {
  double p = 0;
  at::Tensor key;      ///< int64 [1], the bits of a key, on the device of slots_N: a captured graph reads it anew
  at::Tensor slots_N;  ///< int64, Batch::slots_N
  int64_t feature_offset = 0;  ///< global index of the first local feature (row-parallel inputs are slices)

  bool active() const { return p > 0; }
};

/// A key as Dropout takes it.
at::Tensor dropout_key(uint64_t bits, at::Device device = at::kCPU);

/// Kept values are scaled by 1 / (1 - p). Not an autograd node: callers apply it again to gradients. Returns x itself
/// when inactive. x_NI: float32, float64 or bfloat16.
at::Tensor dropout(const at::Tensor& x_NI, const Dropout& dropout);
/// The same as an autograd node.
at::Tensor dropout_node(const at::Tensor& x_NI, const Dropout& dropout);

}  // namespace corank::ops
