#pragma once
#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

namespace corank {

/// One micro-batch of this rank, without padding: its samples one after another in a single row of N tokens. Attention
/// never crosses `cu_seqlens`. Legend: N tokens, M targets, S segments (samples).
struct Batch {
  at::Tensor tokens_N;       ///< int64
  at::Tensor positions_N;    ///< int64, from 0 in every sample
  at::Tensor targets_M;      ///< int64, token ids to predict
  at::Tensor target_rows_M;  ///< int64, row of the hidden state that predicts each target, increasing
  at::Tensor slots_N;     ///< int64, (sequence in the global batch) * seq_len + place in that sequence: names a token
                          ///< whatever the layout, so it is the counter of everything drawn at random per token
  at::Tensor cu_seqlens;  ///< int32 [S + 1], cumulative lengths, on the batch's device
  std::vector<int64_t> lengths;  ///< the same on the host: [S]
  std::vector<int64_t> samples;  ///< number of each segment's sample in its file, -1 where it has none: [S]
  int64_t max_length = 0;        ///< longest segment

  int64_t num_tokens() const { return tokens_N.numel(); }
  int64_t num_targets() const { return targets_M.numel(); }
  /// All tensors on `device`; non-blocking from pinned memory.
  Batch to(at::Device device) const;
};

}  // namespace corank
