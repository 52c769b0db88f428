#include "trainer/model/config_file.h"

namespace corank {

using nlohmann::json;

ConfigFile::ConfigFile(const std::string& text, std::string origin) : origin_(std::move(origin)) {
  json_ = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json_.is_object()) throw InputError(origin_ + ": not a JSON object");
}

int64_t ConfigFile::get_size(const char* key) const { return positive(key, get<int64_t>(key)); }

int64_t ConfigFile::get_size(const char* key, int64_t default_value) const {
  return positive(key, get<int64_t>(key, default_value));
}

int64_t ConfigFile::positive(const char* key, int64_t size) const {
  if (size > 0) return size;
  fail(fmt::format("{} is {} and must be positive", key, size));
}

double ConfigFile::get_probability(const char* key, double default_value) const {
  const auto p = get<double>(key, default_value);
  if (!(p >= 0 && p < 1)) fail(fmt::format("{} is {} and must be in [0, 1)", key, p));
  return p;
}

void ConfigFile::refuse(const std::string& what) const {
  throw InputError(fmt::format("{}: {}. It changes the result and is not supported; remove it or use another model.",
                               origin_, what));
}

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
  if (number("partial_rotary_factor", file.get<double>("partial_rotary_factor", 1.0)) != 1) {
    file.refuse("partial_rotary_factor is not 1");
  }
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

}  // namespace corank
