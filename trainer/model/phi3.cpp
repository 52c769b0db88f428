#include "trainer/model/config_file.h"
#include "trainer/model/decoder.h"

namespace corank {

DecoderConfig phi3_config(const ConfigFile& file) {
  DecoderConfig c = llama_like_config(file);
  c.norm_eps = file.get<double>("rms_norm_eps", 1e-5);
  c.residual_dropout = file.get_probability("resid_pdrop", 0);
  if (file.has("sliding_window")) {
    c.windows.assign(static_cast<size_t>(c.num_layers), file.get_size("sliding_window"));
  }
  c.names.qkv = {"self_attn.qkv_proj"};
  c.names.feed_forward_in = {"mlp.gate_up_proj"};
  return c;
}

}  // namespace corank
