#include "trainer/model/config_file.h"
#include "trainer/model/decoder.h"

namespace corank {

DecoderConfig mistral_config(const ConfigFile& file) {
  DecoderConfig c = llama_like_config(file);
  if (file.has("layer_types")) file.refuse("layer_types is set");
  if (!file.root().contains("sliding_window")) {
    c.windows.assign(static_cast<size_t>(c.num_layers), 4096);  // Hugging Face's default; null switches it off
  } else if (file.has("sliding_window")) {
    c.windows.assign(static_cast<size_t>(c.num_layers), file.get_size("sliding_window"));
  }
  return c;
}

}  // namespace corank
