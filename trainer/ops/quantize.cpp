#include "trainer/ops/quantize.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "trainer/ops/cuda.h"

namespace corank::ops {
namespace {

constexpr int64_t kBlocksPerTask = 256;

int64_t quantized_blocks(int64_t elements, int64_t block) { return (elements + block - 1) / block; }

/// The nearest of N sorted values: as many as there are midpoints strictly below v, so a tie goes to the lower one.
template <int N>
class Nearest {
 public:
  explicit Nearest(const float* values) {
    for (int i = 0; i + 1 < N; ++i) midpoints_[i] = (values[i] + values[i + 1]) * 0.5F;
  }
  uint8_t operator()(float v) const {
    int index = 0;
    for (int step = N / 2; step > 0; step /= 2) index += v > midpoints_[index + step - 1] ? step : 0;
    return static_cast<uint8_t>(index);
  }

 private:
  std::array<float, N - 1> midpoints_;
};

/// Codes of one block, one a byte; returns its absmax. The product with the reciprocal is what CUDA's bitsandbytes
/// computes; the bound makes a block of zeros zero.
template <int N, class T>
float quantise_block(const T* values, int64_t count, const Nearest<N>& nearest, uint8_t* codes) {
  float absmax = 0;
  for (int64_t i = 0; i < count; ++i) absmax = std::max(absmax, std::abs(static_cast<float>(values[i])));
  const float reciprocal = 1 / std::max(absmax, 1e-38F);
  for (int64_t i = 0; i < count; ++i) codes[i] = nearest(static_cast<float>(values[i]) * reciprocal);
  return absmax;
}

/// Blocks [begin, end) of a tensor of `count` values into packed codes and absmax.
template <class T>
void quantise_blocks(const T* values, int64_t count, uint8_t* packed, float* absmax, int64_t begin, int64_t end) {
  const Nearest<16> nearest(kNf4Values.data());
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kNf4Block, size = std::min(kNf4Block, count - first);
    std::array<uint8_t, kNf4Block> codes;
    codes.fill(nearest(0));  // beyond an odd end
    absmax[block] = quantise_block(values + first, size, nearest, codes.data());
    for (int64_t i = 0; i < size; i += 2) {
      packed[(first + i) / 2] = static_cast<uint8_t>(codes[i] << 4 | codes[i + 1]);
    }
  }
}

/// Replaces the float32 absmax by their codes (meta: by their shapes).
void quantise_statistics(Nf4& w) {
  const at::Tensor absmax = w.absmax_RB;
  const int64_t count = absmax.numel();
  w.nested_map = nf4_nested_map();
  w.nested_absmax = at::empty({quantized_blocks(count, kNf4NestedBlock)}, absmax.options());
  w.absmax_RB = at::empty_like(absmax, at::kByte);
  if (absmax.is_meta()) return;
  const auto* values = absmax.const_data_ptr<float>();
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i];
  w.nested_offset = static_cast<float>(sum / static_cast<double>(count));
  const at::Tensor centred = absmax - w.nested_offset;
  const Nearest<256> nearest(w.nested_map.const_data_ptr<float>());
  auto* nested = w.nested_absmax.mutable_data_ptr<float>();
  for (int64_t first = 0; first < count; first += kNf4NestedBlock) {
    nested[first / kNf4NestedBlock] =
        quantise_block(centred.const_data_ptr<float>() + first, std::min(kNf4NestedBlock, count - first), nearest,
                       w.absmax_RB.mutable_data_ptr<uint8_t>() + first);
  }
}

/// One code a byte, and back.
at::Tensor unpack(const at::Tensor& packed, int64_t count) {
  return at::stack({packed.bitwise_right_shift(4), packed.bitwise_and(15)}, 1).flatten().narrow(0, 0, count);
}
at::Tensor pack(const at::Tensor& codes) {
  const at::Tensor pairs = at::constant_pad_nd(codes.flatten(), {0, codes.numel() % 2}).view({-1, 2});
  return pairs.select(1, 0).bitwise_left_shift(4).bitwise_or(pairs.select(1, 1));
}

/// absmax of the blocks that each run touches. A run of n elements touches at most (n + 62) / 64 + 1 of them.
at::Tensor absmax_of_runs(const at::Tensor& absmax, const Runs& runs) {
  const auto index = at::TensorOptions(at::kLong).device(absmax.device());
  const at::Tensor first = (at::arange(runs.count, index) * runs.stride + runs.start).div(kNf4Block, "floor");
  const at::Tensor within = at::arange((runs.length + kNf4Block - 2) / kNf4Block + 1, index);
  const at::Tensor blocks = (first.unsqueeze(1) + within).clamp_max(absmax.numel() - 1);
  return absmax.flatten().gather(0, blocks.flatten()).view(blocks.sizes());
}

/// Entries [begin, end) of absmax_RB, each with the elements that its block has in its run.
template <class T>
void dequantise_blocks(const Nf4& w, T* out, int64_t begin, int64_t end) {
  const Runs& runs = w.runs;
  const int64_t blocks_per_run = w.absmax_RB.size(1);
  const auto* packed = w.codes.const_data_ptr<uint8_t>();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t run = i / blocks_per_run, first = runs.start + run * runs.stride;
    const int64_t block = first / kNf4Block + i % blocks_per_run;
    const int64_t from = std::max(block * kNf4Block - first, int64_t{0});
    const int64_t to = std::min((block + 1) * kNf4Block - first, runs.length);
    if (from >= to) continue;  // a spare
    float absmax = 0;
    if (w.double_quantised()) {
      const float value = w.nested_map.const_data_ptr<float>()[w.absmax_RB.const_data_ptr<uint8_t>()[i]];
      absmax = value * w.nested_absmax.const_data_ptr<float>()[block / kNf4NestedBlock] + w.nested_offset;
    } else {
      absmax = w.absmax_RB.const_data_ptr<float>()[i];
    }
    std::array<T, 16> values;
    for (int code = 0; code < 16; ++code) values[code] = static_cast<T>(kNf4Values[code] * absmax);
    for (int64_t e = run * runs.length + from; e < run * runs.length + to; ++e) {
      out[e] = values[packed[e / 2] >> (e % 2 == 0 ? 4 : 0) & 15];
    }
  }
}

}  // namespace

// As bitsandbytes computes it, so that a machine has one map: for each decade 10^(i - 6) the midpoints of 2^i equal
// parts of [0.1, 1], both signs, and 0 and 1.
at::Tensor nf4_nested_map() {
  std::vector<at::Tensor> parts{at::tensor({0.0F, 1.0F})};
  for (int i = 0; i < 7; ++i) {
    const int64_t count = int64_t{1} << i;
    const at::Tensor ends = at::linspace(0.1, 1, count + 1, at::kFloat);
    const at::Tensor positive = (ends.narrow(0, 0, count) + ends.narrow(0, 1, count)) / 2 * std::pow(10.0, i - 6);
    parts.push_back(positive);
    parts.push_back(-positive);
  }
  return std::get<0>(at::cat(parts).sort());
}

int64_t Nf4::bytes() const {
  size_t total = codes.nbytes() + absmax_RB.nbytes();
  if (double_quantised()) total += nested_absmax.nbytes() + nested_map.nbytes();
  return static_cast<int64_t>(total);
}

Nf4 Nf4::to(at::Device device) const {
  Nf4 moved = *this;
  for (at::Tensor* part : {&moved.codes, &moved.absmax_RB, &moved.nested_absmax, &moved.nested_map}) {
    if (part->defined()) *part = part->to(device);
  }
  return moved;
}

Nf4 nf4_quantise(const at::Tensor& w_OI, bool double_quant) {
  TORCH_CHECK(!w_OI.is_cuda() && w_OI.dim() == 2 && w_OI.numel() > 0, "nf4_quantise: a CPU tensor [O, I]");
  const at::Tensor w = w_OI.contiguous();
  const int64_t count = w.numel(), blocks = quantized_blocks(count, kNf4Block);
  Nf4 result;
  result.shape = w.sizes().vec();
  result.runs = {1, count, count, 0};
  result.codes = at::empty({(count + 1) / 2}, w.options().dtype(at::kByte));
  result.absmax_RB = at::empty({1, blocks}, w.options().dtype(at::kFloat));
  if (w.is_meta()) {
    if (double_quant) quantise_statistics(result);
    return result;
  }
  auto* packed = result.codes.mutable_data_ptr<uint8_t>();
  auto* absmax = result.absmax_RB.mutable_data_ptr<float>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, w.scalar_type(), "nf4_quantise", [&] {
    const auto* values = w.const_data_ptr<scalar_t>();
    at::parallel_for(0, blocks, kBlocksPerTask,
                     [&](int64_t begin, int64_t end) { quantise_blocks(values, count, packed, absmax, begin, end); });
  });
  if (double_quant) quantise_statistics(result);
  return result;
}

Nf4 nf4_narrow(const Nf4& full, int64_t dim, int64_t start, int64_t length) {
  const int64_t rows = full.shape.at(0), columns = full.shape.at(1);
  TORCH_CHECK(full.runs.count == 1 && full.runs.length == rows * columns && full.runs.start == 0,
              "nf4_narrow: of a full tensor");
  Nf4 part = full;
  part.shape.at(dim) = length;
  part.runs =
      dim == 0 ? Runs{1, length * columns, length * columns, start * columns} : Runs{rows, length, columns, start};
  part.codes = pack(unpack(full.codes, rows * columns).view(full.shape).narrow(dim, start, length));
  part.absmax_RB = absmax_of_runs(full.absmax_RB, part.runs);
  return part;
}

at::Tensor nf4_dequantise(const Nf4& w, at::ScalarType dtype) {
  at::Tensor out = at::empty(w.shape, w.codes.options().dtype(dtype));
  if (out.is_cuda()) {
    cuda::nf4_dequantise(w, out);
    return out;
  }
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, dtype, "nf4_dequantise", [&] {
    auto* values = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, w.absmax_RB.numel(), kBlocksPerTask,
                     [&](int64_t begin, int64_t end) { dequantise_blocks(w, values, begin, end); });
  });
  return out;
}

Int8 int8_quantise(const at::Tensor& w_OI) {
  if (w_OI.is_meta()) {
    return {at::empty_like(w_OI, at::kChar), at::empty({w_OI.size(0), 1}, w_OI.options().dtype(at::kFloat))};
  }
  const at::Tensor w = w_OI.to(at::kFloat);
  const at::Tensor quotient = w.abs().amax(1, /*keepdim=*/true) / 127;
  const at::Tensor scale_O1 = at::where(quotient > 0, quotient, at::ones_like(quotient));
  // The bound acts only where the scale itself is too small to be exact.
  return {(w / scale_O1).round_().clamp_(-127, 127).to(at::kChar), scale_O1};
}

at::Tensor int8_dequantise(const Int8& w, at::ScalarType dtype) {
  at::Tensor out = at::empty(w.q_OI.sizes(), w.q_OI.options().dtype(dtype));
  return at::mul_out(out, w.q_OI, w.scale_O1);
}

}  // namespace corank::ops
