#include "trainer/ops/linear.h"

#include <torch/csrc/autograd/custom_function.h>

#include <array>

namespace corank::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// What may train in a projection, in a fixed order: W, bias, A, B. Undefined where it does not.
std::array<at::Tensor, 4> leaves_of(const Projection& p) {
  return {p.matrix_leaf, p.bias_O.leaf, p.low_rank ? p.low_rank->a_RI.leaf : at::Tensor(),
          p.low_rank ? p.low_rank->b_OR.leaf : at::Tensor()};
}

struct Call : torch::CustomClassHolder {
  std::vector<Projection> projections;
  bool x_needs_grad = false;
};

at::Tensor forward_one(const at::Tensor& x_NI, const Projection& p, at::Tensor& u_NR) {
  at::Tensor w_OI = p.matrix->dense_OI();
  at::Tensor y_NO = p.bias_O.defined() ? at::addmm(p.bias_O.value, x_NI, w_OI.t()) : at::mm(x_NI, w_OI.t());
  if (!p.low_rank) return y_NO;
  const LowRank& lr = *p.low_rank;
  u_NR = at::mm(dropout(x_NI, lr.dropout), lr.a_RI.value.t());
  return y_NO.addmm_(u_NR, lr.b_OR.value.t(), /*beta=*/1, /*alpha=*/lr.scale);
}

void add_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
  if (sum.defined()) {
    sum.addmm_(a, b);
  } else {
    sum = at::mm(a, b);
  }
}

/// Gradients of A and B, and the adapter's part of dx.
void backward_low_rank(const LowRank& lr, const at::Tensor& x_NI, const at::Tensor& u_NR, const at::Tensor& g_NO,
                       bool x_needs_grad, std::array<at::Tensor, 4>& grads, at::Tensor& dx_NI) {
  at::Tensor du_NR = at::mm(g_NO, lr.b_OR.value).mul_(lr.scale);
  if (lr.a_RI.trains()) grads[2] = matmul_to(du_NR.t(), dropout(x_NI, lr.dropout), lr.a_RI.leaf.scalar_type());
  if (lr.b_OR.trains()) grads[3] = matmul_to(g_NO.t(), u_NR, lr.b_OR.leaf.scalar_type()).mul_(lr.scale);
  if (!x_needs_grad) return;
  if (!lr.dropout.active()) return add_product(dx_NI, du_NR, lr.a_RI.value);
  dx_NI.add_(dropout(at::mm(du_NR, lr.a_RI.value), lr.dropout));
}

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x_NI, at::TensorList /*leaves*/,
                               c10::intrusive_ptr<Call> call) {
    variable_list outputs, saved;
    bool keep_x = false;
    for (const Projection& p : call->projections) {
      at::Tensor u_NR;
      outputs.push_back(forward_one(x_NI, p, u_NR));
      saved.push_back(u_NR);
      keep_x = keep_x || p.matrix_leaf.defined() || (p.low_rank && p.low_rank->a_RI.trains());
    }
    saved.push_back(keep_x ? x_NI : at::Tensor());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["call"] = c10::IValue::make_capsule(std::move(call));
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    auto call = c10::static_intrusive_pointer_cast<Call>(ctx->saved_data["call"].toCapsule());
    variable_list saved = ctx->get_saved_variables();
    const size_t count = call->projections.size();
    const at::Tensor& x_NI = saved[count];
    variable_list grads(1);
    for (size_t i = 0; i < count; ++i) {
      const Projection& p = call->projections[i];
      std::array<at::Tensor, 4> leaf_grads;
      if (grad_outputs[i].defined()) {
        const at::Tensor g_NO = grad_outputs[i].contiguous();
        if (call->x_needs_grad) add_product(grads[0], g_NO, p.matrix->dense_OI());
        if (p.matrix_leaf.defined()) leaf_grads[0] = matmul_to(g_NO.t(), x_NI, p.matrix_leaf.scalar_type());
        if (p.bias_O.trains()) leaf_grads[1] = g_NO.sum(0, /*keepdim=*/false, p.bias_O.leaf.scalar_type());
        if (p.low_rank) {
          backward_low_rank(*p.low_rank, x_NI, saved[i], g_NO, call->x_needs_grad, leaf_grads, grads[0]);
        }
      }
      const auto leaves = leaves_of(p);
      for (size_t k = 0; k < leaves.size(); ++k) {
        if (leaves[k].defined()) grads.push_back(leaf_grads[k]);
      }
    }
    grads.emplace_back();  // the call
    return grads;
  }
};

}  // namespace

std::vector<at::Tensor> linear(const at::Tensor& x_NI, std::vector<Projection> projections) {
  variable_list leaves;
  for (const Projection& p : projections) {
    for (const at::Tensor& leaf : leaves_of(p)) {
      if (leaf.defined()) leaves.push_back(leaf);
    }
  }
  auto call = c10::make_intrusive<Call>();
  call->projections = std::move(projections);
  call->x_needs_grad = x_NI.requires_grad();
  return LinearFunction::apply(x_NI, at::TensorList(leaves), std::move(call));
}

}  // namespace corank::ops
