#pragma once
#include <ATen/ATen.h>

#include <vector>

#include "trainer/ops/dropout.h"

namespace corank::ops {

/// Where the samples of a row of tokens begin and end.
struct Segments {
  at::Tensor cu_seqlens;         ///< int32 [S + 1] on the device of q
  std::vector<int64_t> lengths;  ///< the same on the host: [S]
  int64_t max_length = 0;

  /// All segments are equally long: [N] may be viewed as [S, T].
  bool uniform() const;
};

/// How a score becomes a probability.
struct AttentionRule {
  double scale = 1;
  int64_t window = 0;      ///< a token sees itself and the window - 1 tokens before it; 0: all before it
  Dropout dropout = {};    ///< of the probabilities
  int64_t first_head = 0;  ///< global index of the first local query head (dropout)
  bool causal = true;      ///< false: a token sees those behind it too (encoders), and there is no window
};

/// Attention inside each segment, none across. q_NHd, k_NKd, v_NKd with H a multiple of K (grouped queries,
/// arXiv 2305.13245). Returns [N, H * d] in the input's dtype. Kept for backward: q, k, v, the output and its
/// log-sum-exp. CPU: ATen's flash kernel per segment. CUDA in bfloat16: cuDNN where segments are uniform and their
/// length and the head size are multiples of 64 and no window cuts them, else FlashAttention-2; in float32 and float64
/// the plain formula, segment by segment; so with dropout on every device. Its mask depends on query, head and key
/// alone.
at::Tensor attention(const at::Tensor& q_NHd, const at::Tensor& k_NKd, const at::Tensor& v_NKd,
                     const Segments& segments, const AttentionRule& rule);

/// Attention of the last rows of a sequence to all of it, without gradient (generation): q_NHd are the queries of the
/// last N of T positions, k_TKd and v_TKd the cache. The rule is causal and without dropout.
at::Tensor cached_attention(const at::Tensor& q_NHd, const at::Tensor& k_TKd, const at::Tensor& v_TKd,
                            const AttentionRule& rule);

/// The plain formula by autograd: the twin of `attention` in tests.
at::Tensor attention_reference(const at::Tensor& q_NHd, const at::Tensor& k_NKd, const at::Tensor& v_NKd,
                               const Segments& segments, const AttentionRule& rule);

}  // namespace corank::ops
