#include "trainer/models/quantization_config.h"

#include "trainer/models/config_file.h"

namespace corank {
namespace {

/// For messages: what quantised the weights, and to what.
std::string kind_of(const ConfigFile& config) {
  const std::string method = shown(config.get_optional<std::string>("quant_method").value_or("bitsandbytes"));
  if (!config.get_optional<bool>("load_in_4bit").value_or(false)) return method;
  const std::string type = shown(config.get_optional<std::string>("bnb_4bit_quant_type").value_or("fp4"));
  return method + " with bnb_4bit_quant_type " + type;
}

}  // namespace

std::optional<StoredNf4> stored_as_nf4(const std::string& config_json, const std::string& origin) {
  const JsonObject root(config_json, origin);
  if (!root.has("quantization_config")) return std::nullopt;
  const ConfigFile config(root.get<JsonObject>("quantization_config"));
  const std::string kind = kind_of(config);
  if (kind != R"("bitsandbytes" with bnb_4bit_quant_type "nf4")") {
    config.fail("says that the weights are quantised by " + kind +
                ". Of quantised weights only bitsandbytes' nf4 is read; take the model in 16 bits");
  }
  // What to compute in, and what was left as it is: the files' tensors say that.
  config.ignore({"bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "llm_int8_enable_fp32_cpu_offload",
                 "llm_int8_has_fp16_weight", "llm_int8_skip_modules", "llm_int8_threshold", "load_in_8bit"});
  const StoredNf4 stored{config.get_optional<bool>("bnb_4bit_use_double_quant").value_or(false)};
  config.done();
  return stored;
}

}  // namespace corank
