#include "trainer/model/config_file.h"
#include "trainer/model/decoder.h"

namespace corank {

DecoderConfig qwen2_config(const ConfigFile& file) {
  DecoderConfig c = llama_like_config(file);
  c.qkv_bias = true;
  if (file.get<bool>("use_sliding_window", false)) file.refuse("use_sliding_window is true");
  return c;
}

}  // namespace corank
