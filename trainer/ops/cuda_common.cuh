#pragma once
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "trainer/ops/cuda.h"

/// What the kernels share. A pack is W neighbouring values that one access moves: 16 bytes of them, or a single value
/// where sizes or pointers do not allow more.
namespace corank::ops::cuda {

template <class T>
constexpr int kPackWidth = 16 / sizeof(T);

template <class T, int W>
struct alignas(W * sizeof(T) < 16 ? W * sizeof(T) : 16) Pack {
  T v[W];
};

template <int W, class T>
__device__ inline Pack<T, W> load(const T* values, int64_t pack) {
  return reinterpret_cast<const Pack<T, W>*>(values)[pack];
}

template <int W, class T>
__device__ inline void store(T* values, int64_t pack, const Pack<T, W>& x) {
  reinterpret_cast<Pack<T, W>*>(values)[pack] = x;
}

struct Sum {
  static constexpr float kIdentity = 0;
  static __device__ float combine(float a, float b) { return a + b; }
};

/// Ignores NaN, as fmaxf does.
struct Max {
  static constexpr float kIdentity = std::numeric_limits<float>::lowest();
  static __device__ float combine(float a, float b) { return fmaxf(a, b); }
};

template <class Op>
__device__ inline float warp_reduce(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x = Op::combine(x, __shfl_xor_sync(0xFFFFFFFFu, x, distance));
  }
  return x;
}

/// Requires: a one-dimensional block of whole warps, all of them here. Every thread gets the result. Once in a kernel
/// for each Op: a second call would overwrite what slower warps still read.
template <class Op>
__device__ inline float block_reduce(float x) {
  __shared__ float of_warp[32];
  const unsigned lane = threadIdx.x % 32, warps = blockDim.x / 32;
  x = warp_reduce<Op>(x);
  if (lane == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_reduce<Op>(lane < warps ? of_warp[lane] : Op::kIdentity);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// The first dimension of a grid.
inline unsigned grid_size(int64_t blocks) {
  TORCH_CHECK(blocks > 0 && blocks <= std::numeric_limits<int32_t>::max(), "no CUDA grid has ", blocks, " blocks");
  return static_cast<unsigned>(blocks);
}

/// Whole warps, one thread for each of `items` where `most` allows.
inline unsigned block_size(int64_t items, int64_t most) {
  return static_cast<unsigned>(std::min(most, ceil_div(items, 32) * 32));
}

/// Requires of an argument that it is what the kernels read.
inline void require(const at::Tensor& x, at::ScalarType dtype, int64_t numel, const char* name) {
  TORCH_CHECK(x.is_cuda() && x.is_contiguous() && x.scalar_type() == dtype && x.numel() == numel, name,
              ": the kernel needs a contiguous CUDA tensor of ", numel, " ", dtype, ", not ", x.scalar_type(), " ",
              x.sizes(), " with strides ", x.strides(), " on ", x.device());
  // Kernels start on the current device's stream: on another device's memory they would race or read nothing.
  TORCH_CHECK(x.get_device() == c10::cuda::current_device(), name, ": on ", x.device(), ", but the current device is ",
              static_cast<int>(c10::cuda::current_device()));
}

/// Rows of `width` values of T that begin where these tensors do consist of whole packs.
template <class T>
bool has_packs(int64_t width, at::TensorList tensors) {
  return width % kPackWidth<T> == 0 && std::all_of(tensors.begin(), tensors.end(), [](const at::Tensor& x) {
           return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
         });
}

/// run(T{}) with T the type of x's values.
template <class Run>
void with_type(const at::Tensor& x, const Run& run) {
  TORCH_CHECK(has_kernel(x), "no CUDA kernel for ", x.scalar_type());
  x.scalar_type() == at::kFloat ? run(float{}) : run(at::BFloat16{});
}

/// run(T{}, W) with W, a constant, the widest pack for rows of `width` values of `x` and the other tensors.
template <class Run>
void with_packs(const at::Tensor& x, int64_t width, at::TensorList others, const Run& run) {
  with_type(x, [&](auto type) {
    using T = decltype(type);
    if (has_packs<T>(width, x) && has_packs<T>(width, others)) {
      run(type, std::integral_constant<int, kPackWidth<T>>{});
    } else {
      run(type, std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace corank::ops::cuda
