#include "trainer/model/config_file.h"
#include "trainer/model/decoder.h"

namespace corank {

DecoderConfig llama_like_config(const ConfigFile& file) {
  DecoderConfig c;
  c.vocab_size = file.get_size("vocab_size");
  c.hidden_size = file.get_size("hidden_size");
  c.intermediate_size = file.get_size("intermediate_size");
  c.num_layers = file.get_size("num_hidden_layers");
  c.num_heads = file.get_size("num_attention_heads");
  c.num_kv_heads = file.get_size("num_key_value_heads", c.num_heads);
  if (c.num_heads % c.num_kv_heads != 0) {
    file.fail("num_attention_heads must be a multiple of num_key_value_heads");
  }
  c.head_dim = file.get_size("head_dim", c.hidden_size / c.num_heads);
  if (c.head_dim % 2 != 0) file.fail("head_dim must be even");
  c.norm_eps = file.get<double>("rms_norm_eps", 1e-6);
  c.tied_head = file.get<bool>("tie_word_embeddings", false);
  c.rope = rope_config(file);
  if (!(c.rope.theta > 0)) file.fail(fmt::format("rope_theta {} must be positive", c.rope.theta));
  const auto activation = file.get<std::string>("hidden_act", "silu");
  if (activation != "silu") file.refuse(fmt::format("hidden_act is {}, not silu", activation));
  c.attention_dropout = file.get_probability("attention_dropout", 0);
  return c;
}

DecoderConfig llama_config(const ConfigFile& file) {
  DecoderConfig c = llama_like_config(file);
  c.qkv_bias = c.attention_out_bias = file.get<bool>("attention_bias", false);
  c.mlp_bias = file.get<bool>("mlp_bias", false);
  if (file.has("sliding_window")) file.refuse("sliding_window is set");
  return c;
}

}  // namespace corank
