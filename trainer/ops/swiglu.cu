#include "trainer/ops/cuda_common.cuh"

namespace corank::ops::cuda {
namespace {

constexpr int kThreads = 256;

__device__ int64_t thread_index() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }

/// __fdividef: within 2 ulp, and 0 where exp overflows.
__device__ float divided_by_one_plus_exp(float x, float gate) { return __fdividef(x, 1 + expf(-gate)); }

template <class T, int W>
__global__ void __launch_bounds__(kThreads)
    forward(const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ y, int64_t packs) {
  const int64_t i = thread_index();
  if (i >= packs) return;
  const Pack<T, W> gates = load<W>(gate, i), ups = load<W>(up, i);
  Pack<T, W> out;
#pragma unroll
  for (int j = 0; j < W; ++j) {
    const float g = gates.v[j];
    out.v[j] = static_cast<T>(divided_by_one_plus_exp(g, g) * static_cast<float>(ups.v[j]));
  }
  store<W>(y, i, out);
}

/// With s = sigmoid(gate): dup = grad gate s, dgate = grad up s (1 + gate (1 - s)).
template <class T, int W>
__global__ void __launch_bounds__(kThreads)
    backward(const T* __restrict__ grad, const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ dgate,
             T* __restrict__ dup, int64_t packs) {
  const int64_t i = thread_index();
  if (i >= packs) return;
  const Pack<T, W> grads = load<W>(grad, i), gates = load<W>(gate, i), ups = load<W>(up, i);
  Pack<T, W> out_gate, out_up;
#pragma unroll
  for (int j = 0; j < W; ++j) {
    const float g = gates.v[j], u = ups.v[j];
    const float s = divided_by_one_plus_exp(1, g), through = s * static_cast<float>(grads.v[j]);
    out_gate.v[j] = static_cast<T>(through * u * (1 + g * (1 - s)));
    out_up.v[j] = static_cast<T>(through * g);
  }
  store<W>(dgate, i, out_gate);
  store<W>(dup, i, out_up);
}

}  // namespace

at::Tensor swiglu_forward(const at::Tensor& gate_NF, const at::Tensor& up_NF) {
  require(gate_NF, gate_NF.scalar_type(), gate_NF.numel(), "swiglu gate");
  require(up_NF, gate_NF.scalar_type(), gate_NF.numel(), "swiglu up");
  at::Tensor y_NF = at::empty_like(gate_NF);
  if (gate_NF.numel() == 0) return y_NF;
  with_packs(gate_NF, gate_NF.numel(), {up_NF, y_NF}, [&](auto type, auto width) {
    using T = decltype(type);
    const int64_t packs = gate_NF.numel() / width;
    forward<T, decltype(width)::value>
        <<<grid_size(ceil_div(packs, kThreads)), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
            gate_NF.const_data_ptr<T>(), up_NF.const_data_ptr<T>(), y_NF.mutable_data_ptr<T>(), packs);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return y_NF;
}

std::pair<at::Tensor, at::Tensor> swiglu_backward(const at::Tensor& grad_NF, const at::Tensor& gate_NF,
                                                  const at::Tensor& up_NF) {
  require(gate_NF, gate_NF.scalar_type(), gate_NF.numel(), "swiglu gate");
  require(grad_NF, gate_NF.scalar_type(), gate_NF.numel(), "swiglu gradient");
  require(up_NF, gate_NF.scalar_type(), gate_NF.numel(), "swiglu up");
  at::Tensor dgate_NF = at::empty_like(gate_NF), dup_NF = at::empty_like(gate_NF);
  if (gate_NF.numel() == 0) return {dgate_NF, dup_NF};
  with_packs(gate_NF, gate_NF.numel(), {grad_NF, up_NF, dgate_NF, dup_NF}, [&](auto type, auto width) {
    using T = decltype(type);
    const int64_t packs = gate_NF.numel() / width;
    backward<T, decltype(width)::value>
        <<<grid_size(ceil_div(packs, kThreads)), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
            grad_NF.const_data_ptr<T>(), gate_NF.const_data_ptr<T>(), up_NF.const_data_ptr<T>(),
            dgate_NF.mutable_data_ptr<T>(), dup_NF.mutable_data_ptr<T>(), packs);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {dgate_NF, dup_NF};
}

}  // namespace corank::ops::cuda
