#include "trainer/layers/projection.h"

#include <torch/csrc/autograd/custom_function.h>

#include "trainer/ops/matmul.h"

namespace corank {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct ProjectionCall : torch::CustomClassHolder {
  std::vector<Projection> projections;
  std::vector<size_t> num_saved;  ///< tensors that each projection's update saved
  int64_t inputs = 0;
  bool x_needs_grad = false;
};

/// One of what trains in the projections, or undefined: autograd makes a node only where an input wants a gradient, and
/// x need not.
at::Tensor anchor_of(const std::vector<Projection>& projections) {
  for (const Projection& p : projections) {
    variable_list leaves{p.matrix_leaf, p.bias_O.leaf};
    if (p.update) {
      for (const at::Tensor& leaf : p.update->leaves()) leaves.push_back(leaf);
    }
    for (const at::Tensor& leaf : leaves) {
      if (leaf.defined() && leaf.requires_grad()) return leaf;
    }
  }
  return {};
}

void backward_one(const Projection& p, const at::Tensor& g_NO, const at::Tensor& x_NI, const variable_list& saved,
                  const InputGradient& dx) {
  if (p.matrix_leaf.defined()) {
    at::Tensor dw_OI = ops::matmul_to(g_NO.t(), x_NI, p.matrix_leaf.scalar_type());
    if (p.matrix_share) {
      p.matrix_share->add_gradient(p.matrix_leaf, std::move(dw_OI));
    } else {
      ops::add_gradient(p.matrix_leaf, dw_OI);
    }
  }
  if (p.bias_O.trains()) {
    ops::add_gradient(p.bias_O.leaf, g_NO.sum(0, /*keepdim=*/false, p.bias_O.leaf.scalar_type()));
  }
  if (p.update) {
    p.update->backward(g_NO, x_NI, *p.matrix, saved, dx);
  } else if (dx.needed()) {
    p.matrix->multiply_transposed(g_NO, dx.dx_NI, dx.write);
  }
}

struct ProjectionNode : torch::autograd::Function<ProjectionNode> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x_NI,
                               const std::optional<at::Tensor>& /*anchor*/, c10::intrusive_ptr<ProjectionCall> call) {
    variable_list outputs, saved;
    bool keep_x = false;
    for (const Projection& p : call->projections) {
      const size_t before = saved.size();
      outputs.push_back(p.update ? p.update->forward(x_NI, *p.matrix, p.bias_O.value, saved)
                                 : p.matrix->multiply(x_NI, p.bias_O.value));
      call->num_saved.push_back(saved.size() - before);
      keep_x = keep_x || p.matrix_leaf.defined() || p.update;
    }
    saved.push_back(keep_x ? x_NI : at::Tensor());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["call"] = c10::IValue::make_capsule(std::move(call));
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    auto call = c10::static_intrusive_pointer_cast<ProjectionCall>(ctx->saved_data["call"].toCapsule());
    const variable_list saved = ctx->get_saved_variables();
    InputGradient dx;
    auto next = saved.begin();
    for (size_t i = 0; i < call->projections.size(); ++i) {
      const variable_list own(next, next + static_cast<int64_t>(call->num_saved[i]));
      next += static_cast<int64_t>(call->num_saved[i]);
      if (!grad_outputs[i].defined()) continue;
      const Projection& p = call->projections[i];
      const at::Tensor g_NO = grad_outputs[i].contiguous();
      if (call->x_needs_grad && !dx.needed()) dx.dx_NI = at::empty({g_NO.size(0), call->inputs}, g_NO.options());
      backward_one(p, g_NO, saved.back(), own, dx);
      dx.write = Write::add;
    }
    return {dx.dx_NI, at::Tensor(), at::Tensor()};
  }
};

}  // namespace

std::vector<at::Tensor> project(const at::Tensor& x_NI, std::vector<Projection> projections) {
  auto call = c10::make_intrusive<ProjectionCall>();
  const at::Tensor anchor = anchor_of(projections);
  call->projections = std::move(projections);
  call->inputs = x_NI.size(1);
  call->x_needs_grad = x_NI.requires_grad();
  return ProjectionNode::apply(x_NI, ops::if_defined(anchor), std::move(call));
}

}  // namespace corank
