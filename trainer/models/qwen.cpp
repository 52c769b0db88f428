#include "trainer/models/config_file.h"
#include "trainer/models/decoder.h"

namespace corank {
namespace {

/// The sizes that transformers takes for both versions.
FamilyDefaults qwen_defaults() {
  return {.vocab_size = 151936,
          .hidden_size = 4096,
          .intermediate_size = 22016,
          .num_layers = 32,
          .num_heads = 32,
          .num_kv_heads = 32,
          .max_positions = 32768,
          .nullable = {"num_key_value_heads"}};
}

/// Layers from max_window_layers on have a window, unless layer_types says which.
std::vector<int64_t> qwen_windows(const ConfigFile& file, int64_t num_layers) {
  if (file.get<bool>("use_sliding_window", false)) {
    return layer_windows(file, num_layers, sliding_window(file, 4096), file.get<int64_t>("max_window_layers", 28));
  }
  file.get_optional<int64_t>("sliding_window");  // not in use, but of the right types
  file.get<int64_t>("max_window_layers", 0);
  return layer_windows(file, num_layers, std::nullopt);
}

DecoderNames qwen3_names() {
  DecoderNames names;
  names.q_norm = "self_attn.q_norm";
  names.k_norm = "self_attn.k_norm";
  return names;
}

}  // namespace

FamilyModules qwen3_modules() { return decoder_modules(qwen3_names()); }

std::unique_ptr<Blueprint> read_qwen2(const ConfigFile& file) {
  file.ignore({"attention_bias", "mlp_bias"});  // q, k and v always have one, the others never
  DecoderConfig c = llama_like_config(file, qwen_defaults());
  c.qkv_bias = true;
  c.windows = qwen_windows(file, c.num_layers);
  return decoder_blueprint(std::move(c));
}

std::unique_ptr<Blueprint> read_qwen3(const ConfigFile& file) {
  file.ignore({"mlp_bias"});
  FamilyDefaults defaults = qwen_defaults();
  defaults.head_dim = 128;
  DecoderConfig c = llama_like_config(file, defaults);
  c.names = qwen3_names();
  c.qkv_bias = c.attention_out_bias = file.get<bool>("attention_bias", false);
  c.windows = qwen_windows(file, c.num_layers);
  return decoder_blueprint(std::move(c));
}

}  // namespace corank
