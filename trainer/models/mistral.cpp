#include "trainer/models/config_file.h"
#include "trainer/models/decoder.h"

namespace corank {

std::unique_ptr<Blueprint> read_mistral(const ConfigFile& file) {
  file.ignore({"attention_bias", "mlp_bias", "use_sliding_window", "max_window_layers"});  // no bias, one rule for all
  DecoderConfig c = llama_like_config(file, {.vocab_size = 32000,
                                             .hidden_size = 4096,
                                             .intermediate_size = 14336,
                                             .num_layers = 32,
                                             .num_heads = 32,
                                             .num_kv_heads = 8,
                                             .max_positions = 131072,
                                             .nullable = {"head_dim"}});
  c.windows = layer_windows(file, c.num_layers, sliding_window(file, 4096));
  return decoder_blueprint(std::move(c));
}

}  // namespace corank
