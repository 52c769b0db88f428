#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "configs/error.h"
#include "trainer/model/decoder.h"

namespace corank {
namespace {

using nlohmann::json;

/// Reads one config.json, with its name in every message.
class ConfigFile {
 public:
  ConfigFile(const std::string& text, std::string origin) : origin_(std::move(origin)) {
    json_ = json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (!json_.is_object()) throw InputError(origin_ + ": not a JSON object");
  }

  const json& root() const { return json_; }
  bool has(const char* key) const { return json_.contains(key) && !json_[key].is_null(); }

  template <class T>
  T get(const char* key) const {
    if (!has(key)) throw InputError(fmt::format("{}: {} is missing", origin_, key));
    return convert<T>(json_[key], key);
  }
  template <class T>
  T get(const char* key, T default_value) const {
    return has(key) ? convert<T>(json_[key], key) : default_value;
  }
  template <class T>
  T convert(const json& value, const char* key) const {
    try {
      return value.get<T>();
    } catch (const json::exception&) {
      throw InputError(fmt::format("{}: {} has the wrong type: {}", origin_, key, value.dump()));
    }
  }
  [[noreturn]] void refuse(const std::string& what) const {
    throw InputError(fmt::format("{}: {}. It changes the result and is not supported; remove it or use another model.",
                                 origin_, what));
  }

 private:
  std::string origin_;
  json json_;
};

/// transformers 5 writes rope_parameters {rope_theta, rope_type, ...}; earlier versions rope_theta and rope_scaling.
RopeConfig rope_config(const ConfigFile& file) {
  RopeConfig rope;
  const json none = json::object();
  const json& scaling = file.has("rope_parameters") ? file.root()["rope_parameters"]
                        : file.has("rope_scaling")  ? file.root()["rope_scaling"]
                                                    : none;
  const auto number = [&](const char* key, double default_value) {
    return scaling.contains(key) ? file.convert<double>(scaling[key], key) : default_value;
  };
  rope.theta = number("rope_theta", file.get<double>("rope_theta", 10000.0));
  const json type = scaling.value("rope_type", scaling.value("type", json("default")));
  if (type == "default") return rope;
  rope.factor = number("factor", 1);
  if (type == "linear") {
    rope.scaling = RopeConfig::Scaling::linear;
  } else if (type == "llama3") {
    rope.scaling = RopeConfig::Scaling::llama3;
    rope.low_frequency_factor = number("low_freq_factor", 1);
    rope.high_frequency_factor = number("high_freq_factor", 4);
    rope.original_max_positions = static_cast<int64_t>(number("original_max_position_embeddings", 8192));
  } else {
    file.refuse(fmt::format("rope scaling {} is not one of default, linear, llama3", type.dump()));
  }
  return rope;
}

}  // namespace

DecoderConfig llama_config(const std::string& config_json, const std::string& origin) {
  const ConfigFile file(config_json, origin);
  DecoderConfig c;
  c.vocab_size = file.get<int64_t>("vocab_size");
  c.hidden_size = file.get<int64_t>("hidden_size");
  c.intermediate_size = file.get<int64_t>("intermediate_size");
  c.num_layers = file.get<int64_t>("num_hidden_layers");
  c.num_heads = file.get<int64_t>("num_attention_heads");
  c.num_kv_heads = file.get<int64_t>("num_key_value_heads", c.num_heads);
  if (c.vocab_size <= 0 || c.hidden_size <= 0 || c.intermediate_size <= 0 || c.num_layers <= 0 || c.num_heads <= 0 ||
      c.num_kv_heads <= 0 || c.num_heads % c.num_kv_heads != 0) {
    throw InputError(origin + ": sizes must be positive and num_attention_heads a multiple of num_key_value_heads");
  }
  c.head_dim = file.get<int64_t>("head_dim", c.hidden_size / c.num_heads);
  if (c.head_dim <= 0 || c.head_dim % 2 != 0) throw InputError(origin + ": head_dim must be positive and even");
  c.rms_norm_eps = file.get<double>("rms_norm_eps", 1e-6);
  c.tied_head = file.get<bool>("tie_word_embeddings", false);
  c.attention_bias = file.get<bool>("attention_bias", false);
  c.mlp_bias = file.get<bool>("mlp_bias", false);
  c.rope = rope_config(file);
  if (!(c.rope.theta > 0)) throw InputError(fmt::format("{}: rope_theta {} must be positive", origin, c.rope.theta));
  const auto activation = file.get<std::string>("hidden_act", "silu");
  if (activation != "silu") file.refuse(fmt::format("hidden_act is {}, not silu", activation));
  if (file.get<double>("attention_dropout", 0.0) != 0) file.refuse("attention_dropout is not 0");
  if (file.has("sliding_window")) file.refuse("sliding_window is set");
  return c;
}

}  // namespace corank
