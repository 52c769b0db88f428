#include "trainer/ops/cuda_common.cuh"
#include "trainer/ops/philox.h"

namespace corank::ops::cuda {
namespace {

constexpr int kThreads = 256;

struct Mask {
  const int64_t* key;
  uint64_t threshold;
  float scale;
};

template <class T>
__device__ T masked(T x, uint32_t draw, const Mask& mask) {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  return draw >= mask.threshold ? static_cast<T>(static_cast<Wide>(x) * mask.scale) : T(0);
}

/// One block a row. `offset` is a multiple of 4: a pack is made of whole draws.
template <class T>
__global__ void __launch_bounds__(kThreads)
    dropout_packs(const T* __restrict__ x, T* __restrict__ y, const int64_t* __restrict__ slots, int64_t packs,
                  int64_t offset, Mask mask) {
  constexpr int W = kPackWidth<T>;
  const int64_t row = blockIdx.x * packs;
  const int64_t slot = slots[blockIdx.x];
  const auto key = static_cast<uint64_t>(*mask.key);
  for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
    Pack<T, W> values = load<W>(x, row + i);
#pragma unroll
    for (int first = 0; first < W; first += 4) {
      const Philox4 draw = philox(key, (offset + i * W + first) / 4, slot);
#pragma unroll
      for (int j = 0; j < 4; ++j) values.v[first + j] = masked(values.v[first + j], draw.v[j], mask);
    }
    store<W>(y, row + i, values);
  }
}

/// One block a row. A thread takes the up to 4 features of one draw, so that no draw is made twice.
template <class T>
__global__ void __launch_bounds__(kThreads)
    dropout_draws(const T* __restrict__ x, T* __restrict__ y, const int64_t* __restrict__ slots, int64_t width,
                  int64_t offset, Mask mask) {
  const int64_t row = blockIdx.x * width;
  const int64_t slot = slots[blockIdx.x];
  const auto key = static_cast<uint64_t>(*mask.key);
  for (int64_t counter = offset / 4 + threadIdx.x; counter * 4 < offset + width; counter += blockDim.x) {
    const Philox4 draw = philox(key, counter, slot);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t i = counter * 4 + j - offset;
      if (i >= 0 && i < width) y[row + i] = masked(x[row + i], draw.v[j], mask);
    }
  }
}

template <class T>
void launch(const at::Tensor& x_NI, const at::Tensor& y_NI, const Dropout& d) {
  const int64_t width = x_NI.size(1), packs = width / kPackWidth<T>;
  const Mask mask{d.key.const_data_ptr<int64_t>(), static_cast<uint64_t>(d.p * 4294967296.0),
                  static_cast<float>(1.0 / (1.0 - d.p))};
  const unsigned grid = grid_size(x_NI.size(0));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const T* x = x_NI.const_data_ptr<T>();
  T* y = y_NI.mutable_data_ptr<T>();
  const int64_t* slots = d.slots_N.const_data_ptr<int64_t>();
  if constexpr (kPackWidth<T> % 4 == 0) {
    if (d.feature_offset % 4 == 0 && has_packs<T>(width, {x_NI, y_NI})) {
      dropout_packs<<<grid, block_size(packs, kThreads), 0, stream>>>(x, y, slots, packs, d.feature_offset, mask);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      return;
    }
  }
  const unsigned block = block_size(ceil_div(width, 4) + 1, kThreads);
  dropout_draws<<<grid, block, 0, stream>>>(x, y, slots, width, d.feature_offset, mask);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

void dropout(const at::Tensor& x_NI, const at::Tensor& y_NI, const Dropout& d) {
  TORCH_CHECK(x_NI.dim() == 2 && d.feature_offset >= 0, "dropout: [N, I] and an offset that is not negative");
  require(x_NI, x_NI.scalar_type(), x_NI.numel(), "dropout x");
  require(y_NI, x_NI.scalar_type(), x_NI.numel(), "dropout y");
  require(d.slots_N, at::kLong, x_NI.size(0), "dropout slots");
  require(d.key, at::kLong, 1, "dropout key");
  if (x_NI.numel() == 0) return;
  if (x_NI.scalar_type() == at::kDouble) return launch<double>(x_NI, y_NI, d);
  with_type(x_NI, [&](auto type) { launch<decltype(type)>(x_NI, y_NI, d); });
}

}  // namespace corank::ops::cuda
