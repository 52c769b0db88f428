#include "trainer/ops/random.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <numbers>

#include "trainer/ops/philox.h"

namespace corank::ops {
namespace {

/// In (0, 1), never 0 or 1.
double to_unit(uint32_t bits) { return (bits + 0.5) * 0x1p-32; }

int64_t row_major_index(int64_t local, at::IntArrayRef shape, at::IntArrayRef global, at::IntArrayRef offset) {
  int64_t index = 0, stride = 1;
  for (int64_t dim = static_cast<int64_t>(shape.size()) - 1; dim >= 0; --dim) {
    index += (local % shape[dim] + offset[dim]) * stride;
    stride *= global[dim];
    local /= shape[dim];
  }
  return index;
}

template <class Draw>
void fill(const at::Tensor& out, at::IntArrayRef global, at::IntArrayRef offset, Draw draw) {
  TORCH_CHECK(out.dim() == static_cast<int64_t>(global.size()) && global.size() == offset.size(), "fill: ranks differ");
  at::Tensor host = at::empty(out.sizes(), at::TensorOptions(at::kDouble));
  auto* values = host.mutable_data_ptr<double>();
  at::parallel_for(0, host.numel(), 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) values[i] = draw(row_major_index(i, out.sizes(), global, offset));
  });
  out.copy_(host);
}

uint64_t mix(uint64_t hash, std::string_view text) {
  for (unsigned char c : text) hash = (hash ^ c) * 0x100000001B3ull;  // FNV-1a
  return (hash ^ 0xFF) * 0x100000001B3ull;                            // ends the field: ("ab","c") is not ("a","bc")
}

}  // namespace

uint64_t key_of(uint64_t seed, std::string_view purpose, std::string_view name, uint64_t number) {
  const uint64_t path = mix(mix(0xCBF29CE484222325ull, purpose), name);
  const Philox4 mixed = philox(seed, path, number);
  return uint64_t{mixed.v[0]} << 32 | mixed.v[1];
}

void fill_uniform(const at::Tensor& out, uint64_t key, double low, double high, at::IntArrayRef global,
                  at::IntArrayRef offset) {
  fill(out, global, offset, [=](int64_t i) { return low + (high - low) * to_unit(philox(key, i, 0).v[0]); });
}

void fill_normal(const at::Tensor& out, uint64_t key, double mean, double std, at::IntArrayRef global,
                 at::IntArrayRef offset) {
  fill(out, global, offset, [=](int64_t i) {
    const Philox4 draw = philox(key, i, 0);
    const double radius = std::sqrt(-2 * std::log(to_unit(draw.v[0])));
    return mean + std * radius * std::cos(2 * std::numbers::pi * to_unit(draw.v[1]));
  });
}

}  // namespace corank::ops
