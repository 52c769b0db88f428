#include "trainer/ops/cuda_common.cuh"

namespace corank::ops::cuda {
namespace {

constexpr int kStatisticsThreads = 512;
constexpr int kGradientThreads = 256;
constexpr int kInFlight = 16;  // values that a thread loads before it uses the first

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Packs first, first + stride, .. as floats; -inf, which adds nothing to a sum of exponentials, beyond the end.
template <int W, class T>
__device__ void load_many(const T* row, int64_t first, int64_t packs, float (&x)[kInFlight]) {
#pragma unroll
  for (int k = 0; k < kInFlight / W; ++k) {
    const int64_t i = first + int64_t{k} * blockDim.x;
    Pack<T, W> pack;
    if (i < packs) pack = load<W>(row, i);
#pragma unroll
    for (int j = 0; j < W; ++j) x[k * W + j] = i < packs ? static_cast<float>(pack.v[j]) : -kInfinity;
  }
}

/// One block a row, in one pass: each thread rescales its sum when its maximum grows (arXiv 1805.02867). The maximum
/// starts at the lowest finite number, so that -inf logits never give inf - inf.
template <class T, int W>
__global__ void __launch_bounds__(kStatisticsThreads)
    statistics(const T* __restrict__ logits, const int64_t* __restrict__ targets, float* __restrict__ max_M,
               float* __restrict__ sum_M, float* __restrict__ target_M, int64_t width) {
  const T* row = logits + blockIdx.x * width;
  const int64_t packs = width / W;
  float top = Max::kIdentity, sum = 0;
  for (int64_t first = threadIdx.x; first < packs; first += kInFlight / W * blockDim.x) {
    float x[kInFlight];
    load_many<W>(row, first, packs, x);
    float next = top;
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) next = fmaxf(next, x[j]);
    sum *= expf(top - next);
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) sum += expf(x[j] - next);
    top = next;
  }
  const float row_top = block_reduce<Max>(top);
  const float row_sum = block_reduce<Sum>(sum * expf(top - row_top));
  if (threadIdx.x != 0) return;
  const int64_t target = targets[blockIdx.x];
  max_M[blockIdx.x] = row_top;
  sum_M[blockIdx.x] = row_sum;
  target_M[blockIdx.x] = target >= 0 && target < width ? static_cast<float>(row[target]) : 0.f;
}

/// A block takes kGradientThreads * kInFlight columns (grid y) of one row (grid x).
template <class T, int W>
__global__ void __launch_bounds__(kGradientThreads) gradient(T* __restrict__ logits, const float* __restrict__ lse_M,
                                                             const int64_t* __restrict__ targets, int64_t width) {
  T* row = logits + blockIdx.x * width;
  const int64_t packs = width / W, target = targets[blockIdx.x];
  const int64_t first = int64_t{blockIdx.y} * (kInFlight / W * kGradientThreads) + threadIdx.x;
  const float lse = lse_M[blockIdx.x];
  float x[kInFlight];
  load_many<W>(row, first, packs, x);
#pragma unroll
  for (int k = 0; k < kInFlight / W; ++k) {
    const int64_t i = first + k * kGradientThreads;
    if (i >= packs) return;
    Pack<T, W> out;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const float one = i * W + j == target ? 1.f : 0.f;
      out.v[j] = static_cast<T>(expf(x[k * W + j] - lse) - one);
    }
    store<W>(row, i, out);
  }
}

}  // namespace

void softmax_gradient(const at::Tensor& logits_MV, const at::Tensor& lse_M, const at::Tensor& targets_M) {
  TORCH_CHECK(logits_MV.dim() == 2, "softmax_gradient: [M, V]");
  const int64_t rows = logits_MV.size(0), columns = logits_MV.size(1);
  require(logits_MV, logits_MV.scalar_type(), rows * columns, "softmax_gradient logits");
  require(lse_M, at::kFloat, rows, "softmax_gradient log-sum-exp");
  require(targets_M, at::kLong, rows, "softmax_gradient targets");
  if (logits_MV.numel() == 0) return;
  const int64_t tiles = ceil_div(columns, kGradientThreads * kInFlight);
  TORCH_CHECK(tiles <= 65535, "softmax_gradient: ", columns, " columns are too many");
  const dim3 grid(grid_size(rows), static_cast<unsigned>(tiles));
  with_packs(logits_MV, columns, {}, [&](auto type, auto width) {
    using T = decltype(type);
    gradient<T, decltype(width)::value><<<grid, kGradientThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        logits_MV.mutable_data_ptr<T>(), lse_M.const_data_ptr<float>(), targets_M.const_data_ptr<int64_t>(), columns);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> softmax_statistics(const at::Tensor& logits_MV,
                                                                  const at::Tensor& targets_M) {
  TORCH_CHECK(logits_MV.dim() == 2, "softmax_statistics: [M, V]");
  const int64_t rows = logits_MV.size(0), columns = logits_MV.size(1);
  require(logits_MV, logits_MV.scalar_type(), rows * columns, "softmax_statistics logits");
  require(targets_M, at::kLong, rows, "softmax_statistics targets");
  const auto options = logits_MV.options().dtype(at::kFloat);
  if (logits_MV.numel() == 0) {
    return {at::full({rows}, -kInfinity, options), at::zeros({rows}, options), at::zeros({rows}, options)};
  }
  at::Tensor max_M = at::empty({rows}, options), sum_M = at::empty({rows}, options),
             target_M = at::empty({rows}, options);
  with_packs(logits_MV, columns, {}, [&](auto type, auto width) {
    using T = decltype(type);
    const unsigned block = block_size(columns / width, kStatisticsThreads);
    statistics<T, decltype(width)::value><<<grid_size(rows), block, 0, c10::cuda::getCurrentCUDAStream()>>>(
        logits_MV.const_data_ptr<T>(), targets_M.const_data_ptr<int64_t>(), max_M.mutable_data_ptr<float>(),
        sum_M.mutable_data_ptr<float>(), target_M.mutable_data_ptr<float>(), columns);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {max_M, sum_M, target_M};
}

}  // namespace corank::ops::cuda
