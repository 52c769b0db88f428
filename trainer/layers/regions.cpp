#include "trainer/layers/regions.h"

#include <torch/csrc/autograd/custom_function.h>

namespace corank {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Enter : torch::autograd::Function<Enter> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, Communicator* tp) {
    ctx->saved_data["tp"] = reinterpret_cast<int64_t>(tp);
    return x.view_as(x);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const at::Tensor g = grads[0].contiguous();
    reinterpret_cast<Communicator*>(ctx->saved_data["tp"].toInt())
        ->all_reduce(g, ReduceOp::sum, Purpose::tensor_activations);
    return {g, at::Tensor()};
  }
};

struct Leave : torch::autograd::Function<Leave> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& y, Communicator* tp) {
    tp->all_reduce(y, ReduceOp::sum, Purpose::tensor_activations);
    ctx->mark_dirty({y});
    return y;
  }
  static variable_list backward(AutogradContext*, const variable_list& grads) { return {grads[0], at::Tensor()}; }
};

}  // namespace

at::Tensor enter_tensor_region(const at::Tensor& x, Communicator& tp) {
  return tp.size() == 1 ? x : Enter::apply(x, &tp);
}

at::Tensor leave_tensor_region(const at::Tensor& y, Communicator& tp) {
  return tp.size() == 1 ? y : Leave::apply(y, &tp);
}

}  // namespace corank
