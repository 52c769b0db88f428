#include <algorithm>

#include "trainer/models/config_file.h"
#include "trainer/models/decoder.h"

namespace corank {
namespace {

DecoderNames phi3_names() {
  DecoderNames names;
  names.qkv = {"self_attn.qkv_proj"};
  names.feed_forward_in = {"mlp.gate_up_proj"};
  return names;
}

}  // namespace

FamilyModules phi3_modules() { return decoder_modules(phi3_names()); }

std::unique_ptr<Blueprint> read_phi3(const ConfigFile& file) {
  file.ignore({"attention_bias", "mlp_bias", "embd_pdrop", "use_sliding_window"});  // not read by transformers' Phi-3
  DecoderConfig c = llama_like_config(file, {.vocab_size = 32064,
                                             .hidden_size = 3072,
                                             .intermediate_size = 8192,
                                             .num_layers = 32,
                                             .num_heads = 32,
                                             .max_positions = 4096,
                                             .norm_eps = 1e-5,
                                             .nullable = {"num_key_value_heads"}});
  if (c.rope.scaling != RopeConfig::Scaling::none) {
    file.refuse("rope_scaling (or rope_parameters) names another rope_type than default");
  }
  c.names = phi3_names();
  c.residual_dropout = file.get_probability("resid_pdrop", 0);
  const auto window = sliding_window(file, std::nullopt);
  c.windows = layer_windows(file, c.num_layers, window);
  if (std::count(c.windows.begin(), c.windows.end(), window.value_or(0)) != c.num_layers) {
    file.fail("layer_types says otherwise than sliding_window, which is that of all layers");
  }
  return decoder_blueprint(std::move(c));
}

}  // namespace corank
