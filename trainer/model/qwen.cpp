#include "trainer/model/config_file.h"
#include "trainer/model/decoder.h"

namespace corank {
namespace {

/// Layers from max_window_layers on have a window, unless layer_types says which.
std::vector<int64_t> qwen_windows(const ConfigFile& file, int64_t num_layers) {
  const bool uses = file.get<bool>("use_sliding_window", false);
  const int64_t window = uses ? file.get_size("sliding_window", 4096) : 0;
  const int64_t first = uses ? file.get<int64_t>("max_window_layers", 28) : num_layers;
  std::vector<std::string> types;
  for (int64_t i = 0; i < num_layers; ++i) types.emplace_back(i < first ? "full_attention" : "sliding_attention");
  types = file.get("layer_types", types);
  if (static_cast<int64_t>(types.size()) != num_layers) file.fail("layer_types must name every layer");
  std::vector<int64_t> windows;
  for (const std::string& type : types) {
    if (type != "full_attention" && type != "sliding_attention") file.refuse("layer_types holds " + type);
    if (type == "sliding_attention" && !uses) file.fail("layer_types asks for a window, use_sliding_window is false");
    windows.push_back(type == "sliding_attention" ? window : 0);
  }
  return windows;
}

}  // namespace

DecoderConfig qwen2_config(const ConfigFile& file) {
  DecoderConfig c = llama_like_config(file);
  c.qkv_bias = true;
  c.windows = qwen_windows(file, c.num_layers);
  return c;
}

DecoderConfig qwen3_config(const ConfigFile& file) {
  DecoderConfig c = llama_like_config(file);
  c.head_dim = file.get_size("head_dim", 128);
  c.qkv_bias = c.attention_out_bias = file.get<bool>("attention_bias", false);
  c.windows = qwen_windows(file, c.num_layers);
  c.names.q_norm = "self_attn.q_norm";
  c.names.k_norm = "self_attn.k_norm";
  return c;
}

}  // namespace corank
