#include "trainer/models/config_file.h"
#include "trainer/models/decoder.h"
#include "trainer/models/rope_config.h"

namespace corank {
namespace {

/// Null says that the size follows from others, where the family knows that.
int64_t derived_size(const ConfigFile& file, const FamilyDefaults& defaults, const char* key, int64_t default_value,
                     int64_t derived) {
  if (file.is_null(key) && defaults.nullable.contains(key)) return derived;
  return file.get_size(key, default_value == 0 ? derived : default_value);
}

}  // namespace

double get_norm_eps(const ConfigFile& file, const char* key, double default_value) {
  const auto eps = file.get<double>(key, default_value);
  if (file.value(key).is_number_integer()) file.fail(fmt::format("{} is {}, not a number with a fraction", key, eps));
  if (!(eps >= 0)) file.fail(fmt::format("{} is {} and must not be negative", key, eps));
  return eps;
}

DecoderConfig llama_like_config(const ConfigFile& file, const FamilyDefaults& defaults) {
  DecoderConfig c;
  c.vocab_size = file.get_size("vocab_size", defaults.vocab_size);
  c.hidden_size = file.get_size("hidden_size", defaults.hidden_size);
  c.intermediate_size = file.get_size("intermediate_size", defaults.intermediate_size);
  c.num_layers = file.get_size("num_hidden_layers", defaults.num_layers, kMostLayers);
  c.num_heads = file.get_size("num_attention_heads", defaults.num_heads);
  c.num_kv_heads = derived_size(file, defaults, "num_key_value_heads", defaults.num_kv_heads, c.num_heads);
  if (c.num_heads % c.num_kv_heads != 0) {
    file.fail("num_attention_heads must be a multiple of num_key_value_heads");
  }
  c.head_dim = derived_size(file, defaults, "head_dim", defaults.head_dim, c.hidden_size / c.num_heads);
  if (c.head_dim % 2 != 0) file.fail(fmt::format("head_dim is {} and must be even", c.head_dim));
  c.norm_eps = get_norm_eps(file, "rms_norm_eps", defaults.norm_eps);
  c.tied_head = file.get<bool>("tie_word_embeddings", false);
  constexpr int64_t any = std::numeric_limits<int64_t>::max();
  const int64_t max_positions = file.get_size("max_position_embeddings", defaults.max_positions, any);
  c.rope = rope_config(file, c.head_dim, max_positions);
  const auto activation = file.get<std::string>("hidden_act", "silu");
  if (activation != "silu" && activation != "swish") {
    file.refuse(fmt::format("hidden_act is {}, not silu", shown_key(activation)));
  }
  c.attention_dropout = file.get_probability("attention_dropout", 0);
  return c;
}

FamilyModules llama_modules() { return decoder_modules({}); }

std::unique_ptr<Blueprint> read_llama(const ConfigFile& file) {
  file.ignore({"sliding_window", "use_sliding_window", "max_window_layers"});  // no window in transformers' Llama
  DecoderConfig c = llama_like_config(file, {.vocab_size = 32000,
                                             .hidden_size = 4096,
                                             .intermediate_size = 11008,
                                             .num_layers = 32,
                                             .num_heads = 32,
                                             .max_positions = 2048,
                                             .nullable = {"num_key_value_heads", "head_dim"}});
  if (c.hidden_size % c.num_heads != 0) file.fail("hidden_size must be a multiple of num_attention_heads");
  c.qkv_bias = c.attention_out_bias = file.get<bool>("attention_bias", false);
  c.mlp_bias = file.get<bool>("mlp_bias", false);
  c.windows = layer_windows(file, c.num_layers, std::nullopt);
  return decoder_blueprint(std::move(c));
}

}  // namespace corank
