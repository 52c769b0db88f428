#include "trainer/ops/dropout.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include "trainer/ops/cuda.h"
#include "trainer/ops/philox.h"

namespace corank::ops {
namespace {

struct DropoutCall : torch::CustomClassHolder {
  Dropout dropout;
};

struct DropoutNode : torch::autograd::Function<DropoutNode> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x_NI,
                            c10::intrusive_ptr<DropoutCall> call) {
    at::Tensor y_NI = dropout(x_NI, call->dropout);
    ctx->saved_data["call"] = c10::IValue::make_capsule(std::move(call));
    return y_NI;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto call = c10::static_intrusive_pointer_cast<DropoutCall>(ctx->saved_data["call"].toCapsule());
    return {dropout(grads[0], call->dropout), at::Tensor()};
  }
};

template <class T>
void dropout_rows(const T* x, T* y, const int64_t* slots, int64_t width, const Dropout& d, int64_t begin, int64_t end) {
  const auto threshold = static_cast<uint64_t>(d.p * 4294967296.0);
  const auto scale = static_cast<float>(1.0 / (1.0 - d.p));
  const auto key = static_cast<uint64_t>(*d.key.const_data_ptr<int64_t>());
  for (int64_t row = begin; row < end; ++row) {
    Philox4 draw{};
    for (int64_t i = 0; i < width; ++i) {
      const int64_t feature = d.feature_offset + i;
      if (i == 0 || feature % 4 == 0) draw = philox(key, feature / 4, slots[row]);
      const bool keep = draw.v[feature % 4] >= threshold;
      y[row * width + i] = keep ? static_cast<T>(x[row * width + i] * scale) : T(0);
    }
  }
}

}  // namespace

at::Tensor dropout_key(uint64_t bits, at::Device device) {
  return at::full({1}, static_cast<int64_t>(bits), at::TensorOptions(at::kLong).device(device));
}

at::Tensor dropout(const at::Tensor& x_NI, const Dropout& d) {
  if (!d.active()) return x_NI;
  TORCH_CHECK(d.slots_N.numel() == x_NI.size(0), "dropout: one slot per row");
  TORCH_CHECK(d.key.defined() && d.key.device() == d.slots_N.device(), "dropout: a key on the slots' device");
  const at::Tensor x = x_NI.contiguous();
  at::Tensor y = at::empty_like(x);
  if (x.is_cuda()) {
    cuda::dropout(x, y, d);
    return y;
  }
  const int64_t* slots = d.slots_N.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "dropout", [&] {
    const auto* in = x.const_data_ptr<scalar_t>();
    auto* out = y.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, x.size(0), 16,
                     [&](int64_t begin, int64_t end) { dropout_rows(in, out, slots, x.size(1), d, begin, end); });
  });
  return y;
}

at::Tensor dropout_node(const at::Tensor& x_NI, const Dropout& d) {
  if (!d.active()) return x_NI;
  auto call = c10::make_intrusive<DropoutCall>();
  call->dropout = d;
  return DropoutNode::apply(x_NI, std::move(call));
}

}  // namespace corank::ops
