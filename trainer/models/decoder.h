#pragma once
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "trainer/layers/rope_table.h"
#include "trainer/models/blueprint.h"

namespace corank {

/// Hugging Face's names of a family's modules; those of a layer stand below "<layers>.<i>.". An empty name: the family
/// has no such part. One name where the default has several: one linear that holds their rows one after another.
struct DecoderNames {
  std::string embedding = "model.embed_tokens";
  std::string positions;  ///< learned ones; empty: rotary
  std::string layers = "model.layers";
  std::string attention_norm = "input_layernorm";
  std::vector<std::string> qkv{"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"};
  std::string q_norm, k_norm;  ///< RMSNorm of each head of q and k, before they are turned
  std::string attention_out = "self_attn.o_proj";
  std::string feed_forward_norm = "post_attention_layernorm";
  std::vector<std::string> feed_forward_in{"mlp.gate_proj", "mlp.up_proj"};
  std::string feed_forward_out = "mlp.down_proj";
  std::string final_norm = "model.norm";
  std::string head = "lm_head";
  std::vector<std::string> buffers{"self_attn.rotary_emb.inv_freq"};  ///< of a layer: in some files, follow from config
};

enum class Activation {
  swiglu,    ///< silu(gate) * up
  gelu_new,  ///< the tanh form of gelu (arXiv 1606.08415), without a gate
};

/// A pre-norm decoder: Llama and its relatives, GPT-2. Defaults are Llama's.
struct DecoderConfig {
  DecoderNames names;
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t num_positions = 0;  ///< learned ones
  bool layer_norm = false;    ///< with bias; else RMSNorm
  double norm_eps = 1e-6;
  Activation activation = Activation::swiglu;
  bool tied_head = false;
  bool qkv_bias = false;
  bool attention_out_bias = false;
  bool mlp_bias = false;
  bool fan_in_fan_out = false;  ///< files hold the layers' weights as [in, out]
  double embedding_dropout = 0, attention_dropout = 0, residual_dropout = 0;  ///< of the base, in training
  RopeConfig rope;
  std::vector<int64_t> windows;  ///< of each layer, as in ops::AttentionRule; empty: none has one
  bool causal = true;            ///< as in ops::AttentionRule
};

std::unique_ptr<Blueprint> decoder_blueprint(DecoderConfig config);
FamilyModules decoder_modules(const DecoderNames& names);

/// What transformers takes for sizes that config.json leaves out.
struct FamilyDefaults {
  int64_t vocab_size, hidden_size, intermediate_size, num_layers, num_heads;
  int64_t num_kv_heads = 0;  ///< 0: as many as heads
  int64_t head_dim = 0;      ///< 0: hidden size by heads
  int64_t max_positions;
  double norm_eps = 1e-6;
  std::set<std::string> nullable;  ///< of the last two sizes: may be null, and then follow from the others
};

/// What the families below share: sizes, RMSNorm, rotary positions, silu.
DecoderConfig llama_like_config(const ConfigFile& file, const FamilyDefaults& defaults);
double get_norm_eps(const ConfigFile& file, const char* key, double default_value);

}  // namespace corank
