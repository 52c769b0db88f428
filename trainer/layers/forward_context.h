#pragma once
#include "comm/communicator.h"
#include "data/batch.h"
#include "trainer/layers/dropout_keys.h"
#include "trainer/ops/attention.h"

namespace corank {

/// Attention as a model calls it: in training over the segments of a batch, in generation over a key-value cache.
class AttentionCore {
 public:
  virtual ~AttentionCore() = default;
  /// q_NHd, k_NKd (both turned by their positions), v_NKd of layer `layer` -> [N, H * d].
  virtual at::Tensor attend(int64_t layer, const at::Tensor& q_NHd, const at::Tensor& k_NKd, const at::Tensor& v_NKd,
                            const ops::AttentionRule& rule) = 0;
};

/// What one forward pass is about. Borrowed by everything it passes through, until backward is done.
struct ForwardContext {
  const Batch& batch;
  AttentionCore& attention;
  Communicator& tp;
  DropoutKeys* dropout = nullptr;  ///< those of the step, in training; null: none is drawn
};

}  // namespace corank
