#include "trainer/ops/random.h"

#include <ATen/Parallel.h>

#include <array>
#include <cmath>
#include <numbers>

#include "trainer/ops/philox.h"

namespace corank::ops {
namespace {

/// In (0, 1), never 0 or 1.
double to_unit(uint32_t bits) { return (bits + 0.5) * 0x1p-32; }

/// Index in the global tensor of the first element of local row `row` (all dimensions but the last).
int64_t row_start(int64_t row, at::IntArrayRef shape, at::IntArrayRef global, at::IntArrayRef offset) {
  int64_t index = offset.back(), stride = global.back();
  for (int64_t dim = static_cast<int64_t>(shape.size()) - 2; dim >= 0; --dim) {
    index += (row % shape[dim] + offset[dim]) * stride;
    stride *= global[dim];
    row /= shape[dim];
  }
  return index;
}

/// `draw` turns one Philox block into the four elements of global indices 4 b ... 4 b + 3.
template <class Draw>
void fill(const at::Tensor& out, uint64_t key, at::IntArrayRef global, at::IntArrayRef offset, Draw draw) {
  TORCH_CHECK(out.dim() == static_cast<int64_t>(global.size()) && global.size() == offset.size(), "fill: ranks differ");
  if (out.numel() == 0) return;
  at::Tensor host = at::empty(out.sizes(), at::TensorOptions(at::kDouble));
  auto* values = host.mutable_data_ptr<double>();
  const int64_t width = out.size(-1);
  at::parallel_for(0, host.numel() / width, 1 + 4096 / width, [&](int64_t begin, int64_t end) {
    std::array<double, 4> four{};
    for (int64_t row = begin; row < end; ++row) {
      const int64_t start = row_start(row, out.sizes(), global, offset);
      for (int64_t i = 0; i < width; ++i) {
        const int64_t index = start + i;
        if (i == 0 || index % 4 == 0) four = draw(philox(key, index / 4, 0));
        values[row * width + i] = four[index % 4];
      }
    }
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
  fill(out, key, global, offset, [=](const Philox4& draw) {
    std::array<double, 4> four{};
    for (int k = 0; k < 4; ++k) four[k] = low + (high - low) * to_unit(draw.v[k]);
    return four;
  });
}

void fill_normal(const at::Tensor& out, uint64_t key, double mean, double std, at::IntArrayRef global,
                 at::IntArrayRef offset) {
  fill(out, key, global, offset, [=](const Philox4& draw) {
    std::array<double, 4> four{};
    for (int k = 0; k < 4; k += 2) {
      const double radius = std * std::sqrt(-2 * std::log(to_unit(draw.v[k])));
      const double angle = 2 * std::numbers::pi * to_unit(draw.v[k + 1]);
      four[k] = mean + radius * std::cos(angle);
      four[k + 1] = mean + radius * std::sin(angle);
    }
    return four;
  });
}

}  // namespace corank::ops
