#pragma once
#include "trainer/layers/task_head.h"
#include "trainer/ops/weight.h"

namespace corank {

/// The output head, split by vocabulary rows over tensor-parallel ranks.
struct VocabularyHead {
  ops::Weight weight_VD;   ///< this rank's rows; rows at or beyond `vocab_size` are padding and take no part
  int64_t offset = 0;      ///< global index of the first local row
  int64_t vocab_size = 0;  ///< of the whole model
};

/// Collective over tp. Sum over targets of -log softmax(h W^T)[target], a float64 scalar, equal on all tp ranks.
/// h_ND: hidden states, equal on all tp ranks; target_rows_M, targets_M: int64 as in Batch. Only rows that predict
/// something pass through the head, in chunks of `chunk_rows` (0: chosen from the vocabulary): the logits of a batch
/// never exist. Logits in float32 (float64 inputs: float64). The gradient is formed in forward; kept for backward: dh
/// [M, D] (and dW where the head trains). Traffic: vocabulary_loss 3 floats a target; tensor_activations one [M, D]
/// (training only).
at::Tensor cross_entropy(const at::Tensor& h_ND, const at::Tensor& target_rows_M, const at::Tensor& targets_M,
                         const VocabularyHead& head, Communicator& tp, int64_t chunk_rows = 0);

/// Collective over tp, without a gradient: float64 [2], the sum that cross_entropy gives and the number of targets
/// whose logit no other exceeds. Traffic: vocabulary_loss 3 floats a target.
at::Tensor score(const at::Tensor& h_ND, const at::Tensor& target_rows_M, const at::Tensor& targets_M,
                 const VocabularyHead& head, Communicator& tp, int64_t chunk_rows = 0);

/// Collective over tp. The logits of rows h_MD as every rank needs them for generation: [M, vocab_size], float32.
at::Tensor full_logits(const at::Tensor& h_MD, const VocabularyHead& head, Communicator& tp);

/// Rows of logits that cross_entropy and score hold at once where nobody asks for a number: 256 MiB of them, at least
/// 16 rows. `width`: rows of the head on this rank.
int64_t rows_at_once(int64_t width);

/// The next token: cross_entropy() and score() over a vocabulary.
class NextToken : public TaskHead {
 public:
  explicit NextToken(VocabularyHead head) : head_(std::move(head)) {}
  at::Tensor loss_sum(const at::Tensor& h_ND, const at::Tensor& target_rows_M, const at::Tensor& targets_M,
                      Communicator& tp) const override;
  at::Tensor score(const at::Tensor& h_ND, const at::Tensor& target_rows_M, const at::Tensor& targets_M,
                   Communicator& tp) const override;

 private:
  VocabularyHead head_;
};

}  // namespace corank
