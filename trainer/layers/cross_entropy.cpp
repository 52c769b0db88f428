#include "trainer/layers/cross_entropy.h"

#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "trainer/ops/cuda.h"
#include "trainer/ops/matmul.h"

namespace corank {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kChunkElements = int64_t{1} << 26;  // logits held at once: 256 MiB in float32

struct CrossEntropyCall : torch::CustomClassHolder {
  VocabularyHead head;
  Communicator* tp = nullptr;
  int64_t chunk_rows = 0;
  bool h_needs_grad = false;
};

/// This rank's rows without padding.
at::Tensor rows_VD(const VocabularyHead& head) {
  const int64_t local = head.weight_VD.value.size(0);
  return head.weight_VD.value.narrow(0, 0, std::clamp<int64_t>(head.vocab_size - head.offset, 0, local));
}

int64_t chunk_of(const VocabularyHead& head, int64_t wanted) {
  return wanted > 0 ? wanted : rows_at_once(head.weight_VD.value.size(0));
}

at::ScalarType logits_dtype(const at::Tensor& h) { return h.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

/// (max, sum of exp(logit - max), logit of the target or 0 where another rank holds it), each [M].
std::tuple<at::Tensor, at::Tensor, at::Tensor> statistics(const at::Tensor& logits_MV,
                                                          const at::Tensor& local_targets) {
  if (logits_MV.is_cuda() && ops::cuda::has_kernel(logits_MV))
    return ops::cuda::softmax_statistics(logits_MV, local_targets);
  const int64_t width = logits_MV.size(1);
  if (width == 0) {
    const at::Tensor zero = at::zeros({logits_MV.size(0)}, logits_MV.options());
    return {at::full_like(zero, -std::numeric_limits<double>::infinity()), zero, zero};
  }
  const at::Tensor max_M = logits_MV.amax(1);
  const at::Tensor sum_M = (logits_MV - max_M.unsqueeze(1)).exp_().sum(1);
  const at::Tensor here = local_targets.ge(0).logical_and_(local_targets.lt(width));
  const at::Tensor picked = logits_MV.gather(1, local_targets.clamp(0, width - 1).unsqueeze(1)).squeeze(1);
  return {max_M, sum_M, at::where(here, picked, at::zeros_like(picked))};
}

/// Of every row over the whole vocabulary.
struct Rows {
  at::Tensor lse_M, target_M, max_M;  ///< log-sum-exp, the target's logit, the largest logit
};

/// From every rank's part.
Rows combine(const at::Tensor& max_M, const at::Tensor& sum_M, const at::Tensor& target_M, Communicator& tp) {
  if (tp.size() == 1) return {sum_M.log().add_(max_M), target_M, max_M};
  const at::Tensor top_M = max_M.clone();
  tp.all_reduce(top_M, ReduceOp::max, Purpose::vocabulary_loss);
  const at::Tensor both_2M = at::stack({sum_M * (max_M - top_M).exp_(), target_M});
  tp.all_reduce(both_2M, ReduceOp::sum, Purpose::vocabulary_loss);
  return {both_2M[0].log().add_(top_M), both_2M[1], top_M};
}

Rows score_rows(const at::Tensor& logits_MV, const at::Tensor& local_targets, Communicator& tp) {
  const auto [max_M, sum_M, target_M] = statistics(logits_MV, local_targets);
  return combine(max_M, sum_M, target_M, tp);
}

/// logits <- softmax(logits) - onehot(target).
void to_gradient(const at::Tensor& logits_MV, const at::Tensor& lse_M, const at::Tensor& local_targets) {
  if (logits_MV.is_cuda() && ops::cuda::has_kernel(logits_MV)) {
    return ops::cuda::softmax_gradient(logits_MV, lse_M, local_targets);
  }
  const int64_t width = logits_MV.size(1);
  logits_MV.sub_(lse_M.unsqueeze(1)).exp_();
  if (width == 0) return;
  const at::Tensor here = local_targets.ge(0).logical_and_(local_targets.lt(width));
  const at::Tensor minus_one = here.to(logits_MV.scalar_type()).neg_().unsqueeze(1);
  logits_MV.scatter_add_(1, local_targets.clamp(0, width - 1).unsqueeze(1), minus_one);
}

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& h_ND, const std::optional<at::Tensor>& leaf,
                            const at::Tensor& target_rows_M, const at::Tensor& targets_M,
                            c10::intrusive_ptr<CrossEntropyCall> call) {
    const at::Tensor w_VD = rows_VD(call->head);
    const bool head_trains = call->head.weight_VD.trains();
    const at::Tensor h_MD = h_ND.index_select(0, target_rows_M);
    const at::Tensor local_targets = targets_M - call->head.offset;
    at::Tensor loss = at::zeros({}, h_ND.options().dtype(at::kDouble));
    at::Tensor dh_MD = call->h_needs_grad ? at::empty_like(h_MD) : at::Tensor();
    at::Tensor dw_VD = head_trains ? at::zeros(leaf->sizes(), leaf->options().requires_grad(false)) : at::Tensor();

    const int64_t count = h_MD.size(0);
    for (int64_t start = 0; start < count; start += call->chunk_rows) {
      const int64_t rows = std::min(call->chunk_rows, count - start);
      const at::Tensor h_chunk = h_MD.narrow(0, start, rows);
      const at::Tensor targets = local_targets.narrow(0, start, rows);
      const at::Tensor logits = ops::matmul_to(h_chunk, w_VD.t(), logits_dtype(h_ND));
      const Rows rows_M = score_rows(logits, targets, *call->tp);
      loss.add_((rows_M.lse_M - rows_M.target_M).sum(at::kDouble));
      if (!call->h_needs_grad && !head_trains) continue;
      to_gradient(logits, rows_M.lse_M, targets);
      const at::Tensor dlogits = logits.to(h_ND.scalar_type());
      if (call->h_needs_grad) dh_MD.narrow(0, start, rows).copy_(at::mm(dlogits, w_VD));
      if (head_trains) dw_VD.narrow(0, 0, w_VD.size(0)).add_(ops::matmul_to(dlogits.t(), h_chunk, leaf->scalar_type()));
    }
    if (call->h_needs_grad) call->tp->all_reduce(dh_MD, ReduceOp::sum, Purpose::tensor_activations);
    ctx->save_for_backward({dh_MD, dw_VD, target_rows_M});
    ctx->saved_data["rows"] = h_ND.size(0);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    at::Tensor dh_ND, dw_VD;
    if (saved[0].defined()) {
      dh_ND = at::zeros({ctx->saved_data["rows"].toInt(), saved[0].size(1)}, saved[0].options());
      dh_ND.index_copy_(0, saved[2], saved[0] * grads[0].to(saved[0].scalar_type()));
    }
    if (saved[1].defined()) dw_VD = saved[1] * grads[0].to(saved[1].scalar_type());
    return {dh_ND, dw_VD, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

int64_t rows_at_once(int64_t width) { return std::max<int64_t>(16, kChunkElements / std::max<int64_t>(1, width)); }

at::Tensor cross_entropy(const at::Tensor& h_ND, const at::Tensor& target_rows_M, const at::Tensor& targets_M,
                         const VocabularyHead& head, Communicator& tp, int64_t chunk_rows) {
  auto call = c10::make_intrusive<CrossEntropyCall>();
  call->head = head;
  call->tp = &tp;
  call->chunk_rows = chunk_of(head, chunk_rows);
  call->h_needs_grad = h_ND.requires_grad() && at::GradMode::is_enabled();
  return CrossEntropy::apply(h_ND, ops::if_defined(head.weight_VD.leaf), target_rows_M, targets_M, std::move(call));
}

at::Tensor score(const at::Tensor& h_ND, const at::Tensor& target_rows_M, const at::Tensor& targets_M,
                 const VocabularyHead& head, Communicator& tp, int64_t chunk_rows) {
  const at::AutoGradMode no_grad(false);
  const at::Tensor h_MD = h_ND.index_select(0, target_rows_M), w_VD = rows_VD(head);
  const at::Tensor local_targets = targets_M - head.offset;
  const at::Tensor sums = at::zeros({2}, h_ND.options().dtype(at::kDouble));
  const int64_t step = chunk_of(head, chunk_rows);
  for (int64_t start = 0; start < h_MD.size(0); start += step) {
    const int64_t rows = std::min(step, h_MD.size(0) - start);
    const at::Tensor logits = ops::matmul_to(h_MD.narrow(0, start, rows), w_VD.t(), logits_dtype(h_ND));
    const Rows rows_M = score_rows(logits, local_targets.narrow(0, start, rows), tp);
    sums[0] += (rows_M.lse_M - rows_M.target_M).sum(at::kDouble);
    sums[1] += rows_M.target_M.eq(rows_M.max_M).sum();
  }
  return sums;
}

at::Tensor full_logits(const at::Tensor& h_MD, const VocabularyHead& head, Communicator& tp) {
  const at::Tensor local_MV = ops::matmul_to(h_MD, head.weight_VD.value.t(), logits_dtype(h_MD));
  const at::Tensor all_VM = tp.all_gather(local_MV.t().contiguous(), Purpose::tensor_activations);
  return all_VM.narrow(0, 0, head.vocab_size).t().contiguous();
}

at::Tensor NextToken::loss_sum(const at::Tensor& h_ND, const at::Tensor& target_rows_M, const at::Tensor& targets_M,
                               Communicator& tp) const {
  return cross_entropy(h_ND, target_rows_M, targets_M, head_, tp);
}

at::Tensor NextToken::score(const at::Tensor& h_ND, const at::Tensor& target_rows_M, const at::Tensor& targets_M,
                            Communicator& tp) const {
  return corank::score(h_ND, target_rows_M, targets_M, head_, tp);
}

}  // namespace corank
