#include <set>

#include "trainer/models/config_file.h"
#include "trainer/models/decoder.h"

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

/// Names of the tanh form of gelu.
const std::set<std::string> kGelus{"gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"};

void refuse_variants(const ConfigFile& file) {
  const auto activation = file.get<std::string>("activation_function", "gelu_new");
  if (!kGelus.contains(activation)) {
    file.refuse(fmt::format("activation_function is {}, not gelu_new", shown_key(activation)));
  }
  if (!file.get<bool>("scale_attn_weights", true)) file.refuse("scale_attn_weights is false");
  for (const char* key : {"scale_attn_by_inverse_layer_idx", "add_cross_attention"}) {
    if (file.get<bool>(key, false)) file.refuse(fmt::format("{} is true", key));
  }
}

/// A size under the name that other families give it, which counts before GPT-2's own, as in transformers.
int64_t get_size(const ConfigFile& file, const char* key, const char* alias, int64_t default_value,
                 int64_t most = ConfigFile::kMostSize) {
  const int64_t size = file.get_size(key, default_value, most);
  return file.contains(alias) ? file.get_size(alias, 0, most) : size;
}

}  // namespace

FamilyModules gpt2_modules() { return decoder_modules(gpt2_names()); }

std::unique_ptr<Blueprint> read_gpt2(const ConfigFile& file) {
  file.ignore({"n_ctx", "n_special", "predict_special_tokens", "reorder_and_upcast_attn", "summary_activation",
               "summary_first_dropout", "summary_proj_to_labels", "summary_type",
               "summary_use_proj"});  // no part of the result
  refuse_variants(file);
  DecoderConfig c;
  c.names = gpt2_names();
  c.vocab_size = file.get_size("vocab_size", 50257);
  c.hidden_size = get_size(file, "n_embd", "hidden_size", 768);
  c.intermediate_size = file.has("n_inner") ? file.get_size("n_inner", 0) : 4 * c.hidden_size;
  c.num_layers = get_size(file, "n_layer", "num_hidden_layers", 12, kMostLayers);
  c.num_heads = c.num_kv_heads = get_size(file, "n_head", "num_attention_heads", 12);
  if (c.hidden_size % c.num_heads != 0) file.fail("n_embd must be a multiple of n_head");
  c.head_dim = c.hidden_size / c.num_heads;
  c.num_positions = get_size(file, "n_positions", "max_position_embeddings", 1024);
  c.layer_norm = true;
  c.norm_eps = get_norm_eps(file, "layer_norm_epsilon", 1e-5);
  c.activation = Activation::gelu_new;
  c.tied_head = file.get<bool>("tie_word_embeddings", true);
  c.qkv_bias = c.attention_out_bias = c.mlp_bias = true;
  c.fan_in_fan_out = true;
  c.embedding_dropout = file.get_probability("embd_pdrop", 0.1);
  c.attention_dropout = file.get_probability("attn_pdrop", 0.1);
  c.residual_dropout = file.get_probability("resid_pdrop", 0.1);
  return decoder_blueprint(std::move(c));
}

}  // namespace corank
