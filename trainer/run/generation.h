#pragma once
#include <cstdint>
#include <vector>

#include "trainer/layers/model.h"

namespace corank {

struct GenerationOptions {
  int64_t max_new_tokens = 64;
  double temperature = 0;  ///< 0: greedy
  double top_p = 1;
  uint64_t seed = 42;
  std::vector<int64_t> stop_tokens;  ///< generation ends after one of these (it is part of the result)
};

/// Collective over tp. New tokens after `prompt`, with a key-value cache; equal on all tp ranks. Throws InputError on
/// every rank, naming the position, where a logit is not finite.
std::vector<int64_t> generate(const Model& model, const std::vector<int64_t>& prompt, const GenerationOptions& options,
                              Communicator& tp);

/// Collective over tp. Logits [T, vocab_size] float32 of every position of `tokens` (tests, checks against PEFT).
at::Tensor all_logits(const Model& model, const std::vector<int64_t>& tokens, Communicator& tp);

}  // namespace corank
