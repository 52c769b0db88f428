#include "trainer/ops/cuda_common.cuh"

namespace corank::ops::cuda {
namespace {

constexpr int kThreads = 256;

/// One block a token: x over the packs of half a head, y over heads. Products and sums are rounded one by one (no fused
/// multiply-add), so that the bits are those of the plain form.
template <class T, int W>
__global__ void __launch_bounds__(kThreads)
    turn(const T* __restrict__ x, const float* __restrict__ cos, const float* __restrict__ sin,
         const int64_t* __restrict__ positions, T* __restrict__ y, int64_t heads, int64_t packs, float direction) {
  const int64_t table = positions[blockIdx.x] * packs;
  for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
    const Pack<float, W> c = load<W>(cos, table + i), s = load<W>(sin, table + i);
    for (int64_t head = threadIdx.y; head < heads; head += blockDim.y) {
      const int64_t place = (blockIdx.x * heads + head) * 2 * packs + i;
      const Pack<T, W> first = load<W>(x, place), second = load<W>(x, place + packs);
      Pack<T, W> out_first, out_second;
#pragma unroll
      for (int j = 0; j < W; ++j) {
        const float a = first.v[j], b = second.v[j], sine = direction * s.v[j];
        out_first.v[j] = static_cast<T>(__fsub_rn(__fmul_rn(a, c.v[j]), __fmul_rn(b, sine)));
        out_second.v[j] = static_cast<T>(__fadd_rn(__fmul_rn(b, c.v[j]), __fmul_rn(a, sine)));
      }
      store<W>(y, place, out_first);
      store<W>(y, place + packs, out_second);
    }
  }
}

}  // namespace

at::Tensor rope(const at::Tensor& x_NHd, const at::Tensor& cos_Td, const at::Tensor& sin_Td,
                const at::Tensor& positions_N, int direction) {
  TORCH_CHECK(x_NHd.dim() == 3 && cos_Td.dim() == 2 && x_NHd.size(2) == 2 * cos_Td.size(1),
              "rope: [N, H, d] needs tables [T, d / 2]");
  require(x_NHd, x_NHd.scalar_type(), x_NHd.numel(), "rope x");
  require(cos_Td, at::kFloat, cos_Td.numel(), "rope cosines");
  require(sin_Td, at::kFloat, cos_Td.numel(), "rope sines");
  require(positions_N, at::kLong, x_NHd.size(0), "rope positions");
  at::Tensor y_NHd = at::empty_like(x_NHd);
  if (x_NHd.numel() == 0) return y_NHd;
  const int64_t heads = x_NHd.size(1), half = cos_Td.size(1);
  with_packs(x_NHd, half, {cos_Td, sin_Td, y_NHd}, [&](auto type, auto width) {
    using T = decltype(type);
    const int64_t packs = half / width, columns = std::min<int64_t>(packs, kThreads);
    const dim3 block(static_cast<unsigned>(columns), static_cast<unsigned>(std::min(heads, kThreads / columns)));
    turn<T, decltype(width)::value><<<grid_size(x_NHd.size(0)), block, 0, c10::cuda::getCurrentCUDAStream()>>>(
        x_NHd.const_data_ptr<T>(), cos_Td.const_data_ptr<float>(), sin_Td.const_data_ptr<float>(),
        positions_N.const_data_ptr<int64_t>(), y_NHd.mutable_data_ptr<T>(), heads, packs,
        static_cast<float>(direction));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return y_NHd;
}

}  // namespace corank::ops::cuda
