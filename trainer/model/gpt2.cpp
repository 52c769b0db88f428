#include "trainer/model/config_file.h"
#include "trainer/model/decoder.h"

namespace corank {
namespace {

DecoderNames gpt2_names() {
  DecoderNames names;
  names.embedding = "transformer.wte";
  names.positions = "transformer.wpe";
  names.layers = "transformer.h";
  names.attention_norm = "ln_1";
  names.qkv = {"attn.c_attn"};
  names.attention_out = "attn.c_proj";
  names.feed_forward_norm = "ln_2";
  names.feed_forward_in = {"mlp.c_fc"};
  names.feed_forward_out = "mlp.c_proj";
  names.final_norm = "transformer.ln_f";
  names.buffers = {"attn.bias", "attn.masked_bias"};  // the causal mask
  return names;
}

void refuse_variants(const ConfigFile& file) {
  const auto activation = file.get<std::string>("activation_function", "gelu_new");
  if (activation != "gelu_new" && activation != "gelu_pytorch_tanh") {
    file.refuse(fmt::format("activation_function is {}, not gelu_new", activation));
  }
  if (!file.get<bool>("scale_attn_weights", true)) file.refuse("scale_attn_weights is false");
  for (const char* key : {"scale_attn_by_inverse_layer_idx", "add_cross_attention"}) {
    if (file.get<bool>(key, false)) file.refuse(fmt::format("{} is true", key));
  }
}

}  // namespace

DecoderConfig gpt2_config(const ConfigFile& file) {
  refuse_variants(file);
  DecoderConfig c;
  c.names = gpt2_names();
  c.vocab_size = file.get_size("vocab_size");
  c.hidden_size = file.get_size("n_embd");
  c.intermediate_size = file.get_size("n_inner", 4 * c.hidden_size);
  c.num_layers = file.get_size("n_layer");
  c.num_heads = c.num_kv_heads = file.get_size("n_head");
  if (c.hidden_size % c.num_heads != 0) file.fail("n_embd must be a multiple of n_head");
  c.head_dim = c.hidden_size / c.num_heads;
  c.num_positions = file.get_size("n_positions", 1024);
  c.layer_norm = true;
  c.norm_eps = file.get<double>("layer_norm_epsilon", 1e-5);
  c.activation = Activation::gelu_new;
  c.tied_head = file.get<bool>("tie_word_embeddings", true);
  c.qkv_bias = c.attention_out_bias = c.mlp_bias = true;
  c.fan_in_fan_out = true;
  c.embedding_dropout = file.get_probability("embd_pdrop", 0.1);
  c.attention_dropout = file.get_probability("attn_pdrop", 0.1);
  c.residual_dropout = file.get_probability("resid_pdrop", 0.1);
  return c;
}

}  // namespace corank
