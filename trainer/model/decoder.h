#pragma once
#include <optional>
#include <string>

#include "trainer/model/families.h"
#include "trainer/model/rope_table.h"

namespace corank {

/// A pre-norm decoder with RMSNorm, rotary positions, grouped-query attention and a gated feed-forward part: Llama and
/// its relatives. Names of tensors are Hugging Face's for Llama.
struct DecoderConfig {
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  double rms_norm_eps = 1e-6;
  bool tied_head = false;
  bool attention_bias = false;  ///< on q, k, v and o
  bool mlp_bias = false;
  RopeConfig rope;
};

/// ConfigError if heads, key-value heads or the feed-forward size do not divide by `tensor`.
void check_split(const DecoderConfig& config, int tensor);

std::unique_ptr<Model> make_decoder(const DecoderConfig& config, const ModelOptions& options,
                                    std::shared_ptr<WeightSource> weights, Communicator& tp);

/// The Llama family (Llama 2 and 3, SmolLM2, TinyLlama): reads config.json.
DecoderConfig llama_config(const std::string& config_json, const std::string& origin);

}  // namespace corank
