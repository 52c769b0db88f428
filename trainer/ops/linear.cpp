#include "trainer/ops/linear.h"

#include <torch/csrc/autograd/custom_function.h>

namespace corank::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct LinearCall : torch::CustomClassHolder {
  std::vector<Projection> projections;
  std::vector<size_t> num_saved;  ///< tensors that each projection's update saved
  bool x_needs_grad = false;
};

/// What trains in a projection, in a fixed order: W, bias, then the update's leaves.
variable_list leaves_of(const Projection& p) {
  variable_list leaves;
  if (p.matrix_leaf.defined()) leaves.push_back(p.matrix_leaf);
  if (p.bias_O.trains()) leaves.push_back(p.bias_O.leaf);
  if (p.update) {
    for (const at::Tensor& leaf : p.update->leaves()) leaves.push_back(leaf);
  }
  return leaves;
}

/// Gradients of leaves_of(p); adds to dx.
variable_list backward_one(const Projection& p, const at::Tensor& g_NO, const at::Tensor& x_NI,
                           const variable_list& saved, bool needs_dx, at::Tensor& dx_NI) {
  variable_list grads;
  if (p.matrix_leaf.defined()) grads.push_back(matmul_to(g_NO.t(), x_NI, p.matrix_leaf.scalar_type()));
  if (p.bias_O.trains()) grads.push_back(g_NO.sum(0, /*keepdim=*/false, p.bias_O.leaf.scalar_type()));
  if (p.update) {
    for (at::Tensor& grad : p.update->backward(g_NO, x_NI, *p.matrix, saved, needs_dx, dx_NI)) {
      grads.push_back(std::move(grad));
    }
  } else if (needs_dx) {
    add_product(dx_NI, g_NO, p.matrix->dense_OI());
  }
  return grads;
}

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x_NI, at::TensorList /*leaves*/,
                               c10::intrusive_ptr<LinearCall> call) {
    variable_list outputs, saved;
    bool keep_x = false;
    for (const Projection& p : call->projections) {
      const size_t before = saved.size();
      outputs.push_back(p.update ? p.update->forward(x_NI, *p.matrix, p.bias_O.value, saved)
                                 : affine(x_NI, p.matrix->dense_OI(), p.bias_O.value));
      call->num_saved.push_back(saved.size() - before);
      keep_x = keep_x || p.matrix_leaf.defined() || p.update;
    }
    saved.push_back(keep_x ? x_NI : at::Tensor());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["call"] = c10::IValue::make_capsule(std::move(call));
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    auto call = c10::static_intrusive_pointer_cast<LinearCall>(ctx->saved_data["call"].toCapsule());
    const variable_list saved = ctx->get_saved_variables();
    variable_list grads(1);
    auto next = saved.begin();
    for (size_t i = 0; i < call->projections.size(); ++i) {
      const Projection& p = call->projections[i];
      const variable_list own(next, next + static_cast<int64_t>(call->num_saved[i]));
      next += static_cast<int64_t>(call->num_saved[i]);
      variable_list leaf_grads(leaves_of(p).size());
      if (grad_outputs[i].defined()) {
        leaf_grads =
            backward_one(p, grad_outputs[i].contiguous(), saved.back(), own, call->x_needs_grad, grads.front());
      }
      grads.insert(grads.end(), leaf_grads.begin(), leaf_grads.end());
    }
    grads.emplace_back();  // the call
    return grads;
  }
};

}  // namespace

std::vector<at::Tensor> linear(const at::Tensor& x_NI, std::vector<Projection> projections) {
  variable_list leaves;
  for (const Projection& p : projections) {
    for (const at::Tensor& leaf : leaves_of(p)) leaves.push_back(leaf);
  }
  auto call = c10::make_intrusive<LinearCall>();
  call->projections = std::move(projections);
  call->x_needs_grad = x_NI.requires_grad();
  return LinearFunction::apply(x_NI, at::TensorList(leaves), std::move(call));
}

}  // namespace corank::ops
