#include "trainer/ops/cuda_common.cuh"

namespace corank::ops::cuda {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kManyPacks = 4;  // 512 threads hold a row of 8192 float32 or 16384 bfloat16

template <class T, int K>
using Held = Pack<T, kPackWidth<T>>[K];

/// The packs of a row that this thread holds; zeros beyond its end.
template <class T, int K>
__device__ void hold(const T* values, int64_t row, int packs, Held<T, K>& held) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    held[k] = i < packs ? load<kPackWidth<T>>(values, row + i) : Pack<T, kPackWidth<T>>{};
  }
}

__device__ float reciprocal_norm(float squares, int64_t width, float eps) {
  return rsqrtf(squares / static_cast<float>(width) + eps);
}

/// h / norm is rounded to T before the product with the weight, as in transformers.
template <class T>
__device__ T normalised(T h, float rstd, T weight) {
  const T normed = static_cast<T>(static_cast<float>(h) * rstd);
  return static_cast<T>(static_cast<float>(normed) * static_cast<float>(weight));
}

template <class T>
__device__ float product(T a, T b) {
  return static_cast<float>(a) * static_cast<float>(b);
}

// One block a row, in the four kernels: the row in registers where it fits, read twice where it does not.

template <class T, int K>
__global__ void __launch_bounds__(kMaxThreads)
    forward_held(const T* __restrict__ h, const T* __restrict__ weight, T* __restrict__ y, float* __restrict__ rstd_N,
                 int packs, float eps) {
  constexpr int W = kPackWidth<T>;
  const int64_t row = int64_t{blockIdx.x} * packs;
  Held<T, K> x, w;
  hold<T, K>(h, row, packs, x);
  hold<T, K>(weight, 0, packs, w);
  float squares = 0;
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int j = 0; j < W; ++j) squares += product(x[k].v[j], x[k].v[j]);
  }
  const float rstd = reciprocal_norm(block_reduce<Sum>(squares), int64_t{packs} * W, eps);
  if (threadIdx.x == 0) rstd_N[blockIdx.x] = rstd;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i >= packs) return;
#pragma unroll
    for (int j = 0; j < W; ++j) x[k].v[j] = normalised(x[k].v[j], rstd, w[k].v[j]);
    store<W>(y, row + i, x[k]);
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    forward_loop(const T* __restrict__ h, const T* __restrict__ weight, T* __restrict__ y, float* __restrict__ rstd_N,
                 int64_t width, float eps) {
  const int64_t row = blockIdx.x * width;
  float squares = 0;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) squares += product(h[row + i], h[row + i]);
  const float rstd = reciprocal_norm(block_reduce<Sum>(squares), width, eps);
  if (threadIdx.x == 0) rstd_N[blockIdx.x] = rstd;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) y[row + i] = normalised(h[row + i], rstd, weight[i]);
}

/// dh = rstd (g w - x^ mean(g w x^)), with x^ = h rstd.
template <class T, int K>
__global__ void __launch_bounds__(kMaxThreads)
    backward_held(const T* __restrict__ grad, const T* __restrict__ h, const float* __restrict__ rstd_N,
                  const T* __restrict__ weight, T* __restrict__ dh, int packs) {
  constexpr int W = kPackWidth<T>;
  const int64_t row = int64_t{blockIdx.x} * packs;
  const float rstd = rstd_N[blockIdx.x];
  Held<T, K> x, g, w;
  hold<T, K>(h, row, packs, x);
  hold<T, K>(grad, row, packs, g);
  hold<T, K>(weight, 0, packs, w);
  float dot = 0;
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int j = 0; j < W; ++j) dot += product(g[k].v[j], w[k].v[j]) * (static_cast<float>(x[k].v[j]) * rstd);
  }
  const float mean = block_reduce<Sum>(dot) / static_cast<float>(packs * W);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i >= packs) return;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const float normed = static_cast<float>(x[k].v[j]) * rstd;
      x[k].v[j] = static_cast<T>((product(g[k].v[j], w[k].v[j]) - normed * mean) * rstd);
    }
    store<W>(dh, row + i, x[k]);
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    backward_loop(const T* __restrict__ grad, const T* __restrict__ h, const float* __restrict__ rstd_N,
                  const T* __restrict__ weight, T* __restrict__ dh, int64_t width) {
  const int64_t row = blockIdx.x * width;
  const float rstd = rstd_N[blockIdx.x];
  float dot = 0;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    dot += product(grad[row + i], weight[i]) * (static_cast<float>(h[row + i]) * rstd);
  }
  const float mean = block_reduce<Sum>(dot) / static_cast<float>(width);
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    const float normed = static_cast<float>(h[row + i]) * rstd;
    dh[row + i] = static_cast<T>((product(grad[row + i], weight[i]) - normed * mean) * rstd);
  }
}

/// run(K, threads): K, a constant, is the number of packs that a thread holds, 0 where the row is read in a loop.
template <class T, class Run>
void with_row(int64_t width, at::TensorList tensors, const Run& run) {
  const int64_t packs = width / kPackWidth<T>;
  if (!has_packs<T>(width, tensors) || packs > kManyPacks * kMaxThreads) {
    run(std::integral_constant<int, 0>{}, block_size(width, kMaxThreads));
  } else if (packs <= kMaxThreads / 2) {
    run(std::integral_constant<int, 1>{}, block_size(packs, kMaxThreads));
  } else {
    run(std::integral_constant<int, kManyPacks>{}, block_size(ceil_div(packs, kManyPacks), kMaxThreads));
  }
}

template <class T>
void launch_forward(const at::Tensor& h_ND, const at::Tensor& weight_D, float eps, const at::Tensor& y_ND,
                    const at::Tensor& rstd_N1) {
  const int64_t width = h_ND.size(1);
  const unsigned grid = grid_size(h_ND.size(0));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const T *h = h_ND.const_data_ptr<T>(), *weight = weight_D.const_data_ptr<T>();
  T* y = y_ND.mutable_data_ptr<T>();
  auto* rstd = rstd_N1.mutable_data_ptr<float>();
  with_row<T>(width, {h_ND, weight_D, y_ND}, [&](auto held, unsigned block) {
    constexpr int K = decltype(held)::value;
    if constexpr (K == 0) {
      forward_loop<T><<<grid, block, 0, stream>>>(h, weight, y, rstd, width, eps);
    } else {
      const int packs = static_cast<int>(width / kPackWidth<T>);
      forward_held<T, K><<<grid, block, 0, stream>>>(h, weight, y, rstd, packs, eps);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

template <class T>
void launch_backward(const at::Tensor& grad_ND, const at::Tensor& h_ND, const at::Tensor& rstd_N1,
                     const at::Tensor& weight_D, const at::Tensor& dh_ND) {
  const int64_t width = h_ND.size(1);
  const unsigned grid = grid_size(h_ND.size(0));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const T *grad = grad_ND.const_data_ptr<T>(), *h = h_ND.const_data_ptr<T>(), *weight = weight_D.const_data_ptr<T>();
  const auto* rstd = rstd_N1.const_data_ptr<float>();
  T* dh = dh_ND.mutable_data_ptr<T>();
  with_row<T>(width, {grad_ND, h_ND, weight_D, dh_ND}, [&](auto held, unsigned block) {
    constexpr int K = decltype(held)::value;
    if constexpr (K == 0) {
      backward_loop<T><<<grid, block, 0, stream>>>(grad, h, rstd, weight, dh, width);
    } else {
      const int packs = static_cast<int>(width / kPackWidth<T>);
      backward_held<T, K><<<grid, block, 0, stream>>>(grad, h, rstd, weight, dh, packs);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace

std::pair<at::Tensor, at::Tensor> rms_norm_forward(const at::Tensor& h_ND, const at::Tensor& weight_D, double eps) {
  TORCH_CHECK(h_ND.dim() == 2, "rms_norm: [N, D]");
  require(h_ND, h_ND.scalar_type(), h_ND.numel(), "rms_norm h");
  require(weight_D, h_ND.scalar_type(), h_ND.size(1), "rms_norm weight");
  at::Tensor y_ND = at::empty_like(h_ND);
  at::Tensor rstd_N1 = at::empty({h_ND.size(0), 1}, h_ND.options().dtype(at::kFloat));
  if (h_ND.numel() == 0) return {y_ND, rstd_N1};
  with_type(h_ND,
            [&](auto type) { launch_forward<decltype(type)>(h_ND, weight_D, static_cast<float>(eps), y_ND, rstd_N1); });
  return {y_ND, rstd_N1};
}

at::Tensor rms_norm_backward(const at::Tensor& grad_ND, const at::Tensor& h_ND, const at::Tensor& rstd_N1,
                             const at::Tensor& weight_D) {
  TORCH_CHECK(h_ND.dim() == 2, "rms_norm: [N, D]");
  require(h_ND, h_ND.scalar_type(), h_ND.numel(), "rms_norm h");
  require(grad_ND, h_ND.scalar_type(), h_ND.numel(), "rms_norm gradient");
  require(rstd_N1, at::kFloat, h_ND.size(0), "rms_norm reciprocal norms");
  require(weight_D, h_ND.scalar_type(), h_ND.size(1), "rms_norm weight");
  at::Tensor dh_ND = at::empty_like(h_ND);
  if (h_ND.numel() == 0) return dh_ND;
  with_type(h_ND, [&](auto type) { launch_backward<decltype(type)>(grad_ND, h_ND, rstd_N1, weight_D, dh_ND); });
  return dh_ND;
}

}  // namespace corank::ops::cuda
