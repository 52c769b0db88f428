#include "trainer/layers/embedding.h"

#include <torch/csrc/autograd/custom_function.h>

namespace corank {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Sums rows of equal index in a fixed order on every device; index_add_ would use atomics on CUDA. Autograd takes it
/// to the leaf, so that it adds up with what a tied head gives before both are rounded into the flat buffer.
at::Tensor row_gradient(const at::Tensor& grad_ND, const at::Tensor& rows_N, const at::Tensor& leaf) {
  return at::embedding_dense_backward(grad_ND.to(leaf.scalar_type()), rows_N, leaf.size(0), /*padding_idx=*/-1,
                                      /*scale_grad_by_freq=*/false);
}

struct Embedding : torch::autograd::Function<Embedding> {
  static at::Tensor forward(AutogradContext* ctx, const std::optional<at::Tensor>& leaf, const at::Tensor& tokens_N,
                            const at::Tensor& weight_VD, int64_t offset, Communicator* tp) {
    const at::Tensor local = tokens_N - offset;
    const at::Tensor here = local.ge(0).logical_and_(local.lt(weight_VD.size(0)));
    const at::Tensor rows = local.clamp(0, weight_VD.size(0) - 1);
    at::Tensor x_ND = weight_VD.index_select(0, rows);
    if (tp->size() > 1) {
      x_ND.mul_(here.unsqueeze(1));
      tp->all_reduce(x_ND, ReduceOp::sum, Purpose::tensor_activations);
    }
    if (leaf) ctx->save_for_backward({*leaf, rows, here});
    return x_ND;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor g = grads[0] * saved[2].unsqueeze(1);
    return {row_gradient(g, saved[1], saved[0]), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

struct Lookup : torch::autograd::Function<Lookup> {
  static at::Tensor forward(AutogradContext* ctx, const std::optional<at::Tensor>& leaf, const at::Tensor& rows_N,
                            const at::Tensor& table_PD) {
    if (leaf) ctx->save_for_backward({*leaf, rows_N});
    return table_PD.index_select(0, rows_N);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    return {row_gradient(grads[0], saved[1], saved[0]), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor lookup(const at::Tensor& rows_N, const ops::Weight& table_PD) {
  return Lookup::apply(ops::if_defined(table_PD.leaf), rows_N, table_PD.value);
}

at::Tensor embedding(const at::Tensor& tokens_N, const ops::Weight& weight_VD, int64_t offset, Communicator& tp) {
  return Embedding::apply(ops::if_defined(weight_VD.leaf), tokens_N, weight_VD.value, offset, &tp);
}

}  // namespace corank
