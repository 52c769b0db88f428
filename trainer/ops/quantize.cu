#include "trainer/ops/cuda_common.cuh"

namespace corank::ops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWide = 8;  // codes that a thread takes at once: a part of one block where all runs begin at a multiple
constexpr int64_t kMostRows = 65535;  // second dimension of a grid

struct Values {
  float v[16];
};

/// Nf4's statistics; `codes` is null where absmax is not double quantised.
struct Statistics {
  const float* absmax;
  const uint8_t* codes;
  const float* nested_absmax;
  const float* nested_map;
  float offset;

  /// Product and sum rounded one by one, as on the CPU: a fused multiply-add has other bits.
  __device__ float at(int64_t index, int64_t block) const {
    if (codes == nullptr) return absmax[index];
    return __fadd_rn(__fmul_rn(nested_map[codes[index]], nested_absmax[block / kNf4NestedBlock]), offset);
  }
};

/// Elements [W * pack, W * (pack + 1)) of the packed codes.
template <int W>
__device__ Pack<float, W> look_up(const float* values, const uint8_t* codes, int64_t pack) {
  Pack<float, W> result;
  if constexpr (W == 1) {
    result.v[0] = values[codes[pack / 2] >> (pack % 2 == 0 ? 4 : 0) & 15];
  } else {
    const Pack<uint8_t, W / 2> pairs = load<W / 2>(codes, pack);
#pragma unroll
    for (int j = 0; j < W / 2; ++j) {
      result.v[2 * j] = values[pairs.v[j] >> 4];
      result.v[2 * j + 1] = values[pairs.v[j] & 15];
    }
  }
  return result;
}

/// A row of the grid for each run, a thread for each pack of it.
template <class T, int W>
__global__ void __launch_bounds__(kThreads)
    dequantise(const uint8_t* __restrict__ codes, Statistics statistics, int64_t blocks_per_run, Runs runs,
               Values sixteen, T* __restrict__ out) {
  __shared__ float values[16];
  if (threadIdx.x < 16) values[threadIdx.x] = sixteen.v[threadIdx.x];
  __syncthreads();
  const int64_t pack = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, packs = runs.length / W;
  if (pack >= packs) return;
  for (int64_t run = blockIdx.y; run < runs.count; run += gridDim.y) {
    const int64_t first = runs.start + run * runs.stride, block = (first + pack * W) / kNf4Block;
    const float absmax = statistics.at(run * blocks_per_run + block - first / kNf4Block, block);
    const Pack<float, W> found = look_up<W>(values, codes, run * packs + pack);
    Pack<T, W> weights;
#pragma unroll
    for (int j = 0; j < W; ++j) weights.v[j] = static_cast<T>(found.v[j] * absmax);
    store<W>(out, run * packs + pack, weights);
  }
}

template <class T, int W>
void launch(const Nf4& w, const Statistics& statistics, const at::Tensor& out) {
  const int64_t packs = w.runs.length / W;
  const unsigned block = block_size(packs, kThreads);
  const dim3 grid(grid_size(ceil_div(packs, block)), static_cast<unsigned>(std::min(w.runs.count, kMostRows)));
  Values values;
  std::copy(kNf4Values.begin(), kNf4Values.end(), values.v);
  dequantise<T, W><<<grid, block, 0, c10::cuda::getCurrentCUDAStream()>>>(
      w.codes.const_data_ptr<uint8_t>(), statistics, w.absmax_RB.size(1), w.runs, values, out.mutable_data_ptr<T>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

Statistics statistics_of(const Nf4& w) {
  const int64_t count = w.absmax_RB.numel();
  require(w.absmax_RB, w.double_quantised() ? at::kByte : at::kFloat, count, "nf4 absmax");
  if (!w.double_quantised()) return {w.absmax_RB.const_data_ptr<float>(), nullptr, nullptr, nullptr, 0};
  require(w.nested_absmax, at::kFloat, w.nested_absmax.numel(), "nf4 nested absmax");
  require(w.nested_map, at::kFloat, 256, "nf4 nested map");
  return {nullptr, w.absmax_RB.const_data_ptr<uint8_t>(), w.nested_absmax.const_data_ptr<float>(),
          w.nested_map.const_data_ptr<float>(), w.nested_offset};
}

/// Every run begins and ends at a multiple of kWide, in the full tensor and here.
bool takes_wide_packs(const Nf4& w, const at::Tensor& out) {
  const auto even = [](int64_t x) { return x % kWide == 0; };
  const auto aligned = [](const at::Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0; };
  return even(w.runs.length) && even(w.runs.start) && (even(w.runs.stride) || w.runs.count == 1) && aligned(w.codes) &&
         aligned(out);
}

}  // namespace

void nf4_dequantise(const Nf4& w, const at::Tensor& out) {
  const int64_t count = w.runs.count * w.runs.length;
  require(out, out.scalar_type(), count, "nf4 weights");
  require(w.codes, at::kByte, (count + 1) / 2, "nf4 codes");
  TORCH_CHECK(w.absmax_RB.dim() == 2 && w.absmax_RB.size(0) == w.runs.count, "nf4: statistics of each run");
  const Statistics statistics = statistics_of(w);
  const auto run = [&](auto type) {
    using T = decltype(type);
    takes_wide_packs(w, out) ? launch<T, kWide>(w, statistics, out) : launch<T, 1>(w, statistics, out);
  };
  if (out.scalar_type() == at::kDouble) return run(double{});
  with_type(out, run);
}

}  // namespace corank::ops::cuda
