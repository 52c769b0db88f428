#include "trainer/ops/recompute.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

namespace corank::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct RecomputeCall : torch::CustomClassHolder {
  Block block;
  std::vector<bool> defined;  // which inputs are

  /// The block's inputs from the defined ones alone.
  variable_list spread(at::TensorList given) const {
    variable_list inputs;
    size_t next = 0;
    for (const bool is_defined : defined) inputs.push_back(is_defined ? given[next++] : at::Tensor());
    return inputs;
  }
};

struct Recompute : torch::autograd::Function<Recompute> {
  /// `anchor` requires grad, so that the node exists even where no input does (adapters inside still train).
  static variable_list forward(AutogradContext* ctx, at::TensorList given, const at::Tensor& /*anchor*/,
                               c10::intrusive_ptr<RecomputeCall> call) {
    ctx->save_for_backward(given.vec());
    variable_list outputs = call->block(call->spread(given));
    ctx->saved_data["call"] = c10::IValue::make_capsule(std::move(call));
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    auto call = c10::static_intrusive_pointer_cast<RecomputeCall>(ctx->saved_data["call"].toCapsule());
    variable_list given;
    for (const at::Tensor& saved : ctx->get_saved_variables()) {
      given.push_back(saved.detach().set_requires_grad(saved.requires_grad()));
    }
    const at::AutoGradMode grad_mode(true);
    const variable_list outputs = call->block(call->spread(given));
    variable_list roots, root_grads;
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (!grad_outputs[i].defined() || !outputs[i].requires_grad()) continue;
      roots.push_back(outputs[i]);
      root_grads.push_back(grad_outputs[i]);
    }
    torch::autograd::backward(roots, root_grads);
    variable_list grads;
    for (const at::Tensor& input : given) grads.push_back(input.grad());
    grads.resize(given.size() + 2);  // the anchor, the call
    return grads;
  }
};

}  // namespace

variable_list recompute(const Block& block, const variable_list& inputs) {
  if (!at::GradMode::is_enabled()) return block(inputs);
  auto call = c10::make_intrusive<RecomputeCall>();
  call->block = block;
  const at::Tensor anchor = at::zeros({}, at::TensorOptions(at::kFloat)).requires_grad_();
  variable_list given;
  for (const at::Tensor& input : inputs) {
    call->defined.push_back(input.defined());
    if (input.defined()) given.push_back(input);
  }
  return Recompute::apply(at::TensorList(given), anchor, std::move(call));
}

}  // namespace corank::ops
