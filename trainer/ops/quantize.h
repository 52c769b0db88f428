#pragma once
#include <ATen/ATen.h>

#include <array>
#include <cstdint>
#include <vector>

/// Weights in 4 and 8 bits (methods 6): quantised once on the CPU, dequantised for every product on either device. Both
/// devices give the same bits.
namespace corank::ops {

constexpr int64_t kNf4Block = 64;         ///< weights that share an absmax
constexpr int64_t kNf4NestedBlock = 256;  ///< absmax that share one of the second level

/// Quantiles of the normal distribution (QLoRA, arXiv 2305.14314), the digits that bitsandbytes has.
constexpr std::array<float, 16> kNf4Values{-1.0F,
                                           -0.6961928009986877F,
                                           -0.5250730514526367F,
                                           -0.39491748809814453F,
                                           -0.28444138169288635F,
                                           -0.18477343022823334F,
                                           -0.09105003625154495F,
                                           0.0F,
                                           0.07958029955625534F,
                                           0.16093020141124725F,
                                           0.24611230194568634F,
                                           0.33791524171829224F,
                                           0.44070982933044434F,
                                           0.5626170039176941F,
                                           0.7229568362236023F,
                                           1.0F};

/// The 256 values that bitsandbytes' double quantisation rounds to, sorted: float32 [256], CPU.
at::Tensor nf4_nested_map();

/// What a rank holds of a full tensor, as runs of its row-major order: run r is [start + r * stride, + length).
struct Runs {
  int64_t count = 1, length = 0, stride = 0, start = 0;
};

/// A block [O, I] of a tensor whose blocks of 64 weights follow the full tensor's row-major order: wherever a cut
/// falls, it dequantises to the same bits as in the whole.
struct Nf4 {
  std::vector<int64_t> shape;  ///< of the block
  Runs runs;
  at::Tensor codes;          ///< uint8 [(O * I + 1) / 2], row-major; the even element of a pair in the high nibble
  at::Tensor absmax_RB;      ///< for each run its 64-blocks and perhaps a spare: float32, or uint8 double quantised
  at::Tensor nested_absmax;  ///< float32, of the full tensor, one per 256 blocks; undefined unless double quantised
  at::Tensor nested_map;     ///< float32 [256]
  float nested_offset = 0;   ///< absmax = nested_map[code] * nested_absmax + nested_offset, rounded after each

  bool double_quantised() const { return nested_absmax.defined(); }
  int64_t bytes() const;
  Nf4 to(at::Device device) const;
};

/// w_OI: CPU (meta: shapes only), any floating dtype, finite. bitsandbytes' rules, with one choice where its devices
/// differ: the offset is the mean summed in float64 in order, so that it depends neither on threads nor on processors.
Nf4 nf4_quantise(const at::Tensor& w_OI, bool double_quant);
/// Indices [start, start + length) of dimension `dim` of a full tensor; shares nothing of its size with it.
Nf4 nf4_narrow(const Nf4& full, int64_t dim, int64_t start, int64_t length);
/// [O, I] in float32, float64 or bfloat16 on the weight's device: value * absmax in float32, rounded once.
at::Tensor nf4_dequantise(const Nf4& w, at::ScalarType dtype);

/// A scale for each output row: w = q * scale.
struct Int8 {
  at::Tensor q_OI;      ///< int8, in [-127, 127]
  at::Tensor scale_O1;  ///< float32

  int64_t bytes() const { return static_cast<int64_t>(q_OI.nbytes() + scale_O1.nbytes()); }
};

/// w_OI: any device (meta: shapes only), any floating dtype, finite.
Int8 int8_quantise(const at::Tensor& w_OI);
/// q * scale in float32, rounded once.
at::Tensor int8_dequantise(const Int8& w, at::ScalarType dtype);

}  // namespace corank::ops
