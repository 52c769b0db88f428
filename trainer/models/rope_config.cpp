#include "trainer/models/rope_config.h"

#include <algorithm>
#include <cmath>

namespace corank {
namespace {

using nlohmann::ordered_json;

/// What a reader of one rope_type is given.
struct Source {
  const ConfigFile& file;    ///< config.json
  const ConfigFile& object;  ///< rope_scaling or rope_parameters
  int64_t max_positions;     ///< max_position_embeddings
};

/// transformers then has no rope_scaling.
bool says_nothing(const ordered_json& value) {
  return value.is_null() || value == false || (value.is_object() && value.empty());
}

/// rope_scaling counts before rope_parameters, as a whole.
ConfigFile rope_object(const ConfigFile& file) {
  const ordered_json& scaling = file.value("rope_scaling");
  const auto parameters = file.get_optional<JsonObject>("rope_parameters");
  if (!says_nothing(scaling)) return ConfigFile(file.convert<JsonObject>(scaling, "rope_scaling"));
  return parameters ? ConfigFile(*parameters) : ConfigFile(ordered_json::object(), file.origin());
}

double original_positions(const Source& s) {
  const char* key = "original_max_position_embeddings";
  if (s.file.contains(key)) return s.file.get_positive(key);
  return s.object.contains(key) ? s.object.get_positive(key) : static_cast<double>(s.max_positions);
}

void read_default(const Source&, RopeConfig&) {}

void read_linear(const Source& s, RopeConfig& rope) { rope.factor = s.object.get_positive("factor"); }

void read_dynamic(const Source& s, RopeConfig& rope) {
  s.object.get_positive("factor");  // of longer sequences than are taken
  rope.most_positions = s.max_positions;
}

void read_llama3(const Source& s, RopeConfig& rope) {
  rope.factor = s.object.get_positive("factor");
  rope.low_frequency_factor = s.object.get_positive("low_freq_factor");
  rope.high_frequency_factor = s.object.get_positive("high_freq_factor");
  rope.original_max_positions = original_positions(s);
}

/// 0 and null stand for the default, as in transformers.
double number_or(const ConfigFile& object, const char* key, double default_value) {
  const double number = object.get_optional<double>(key).value_or(0);
  return number == 0 ? default_value : number;
}

/// The paper's section 3.4; mscale and mscale_all_dim are DeepSeek's.
double yarn_attention_factor(const ConfigFile& object, double factor) {
  if (const auto given = object.get_optional<double>("attention_factor")) return *given;
  const auto scale = [&](double weight) { return factor <= 1 ? 1 : 0.1 * weight * std::log(factor) + 1; };
  const double mscale = number_or(object, "mscale", 0), all_dim = number_or(object, "mscale_all_dim", 0);
  return mscale != 0 && all_dim != 0 ? scale(mscale) / scale(all_dim) : scale(1);
}

void read_yarn(const Source& s, RopeConfig& rope) {
  rope.original_max_positions = original_positions(s);
  rope.factor = s.object.is_null("factor") ? static_cast<double>(s.max_positions) / rope.original_max_positions
                                           : s.object.get_positive("factor");
  rope.attention_factor = yarn_attention_factor(s.object, rope.factor);
  rope.beta_fast = number_or(s.object, "beta_fast", 32);
  rope.beta_slow = number_or(s.object, "beta_slow", 1);
  if (rope.beta_fast < 0 || rope.beta_slow < 0) s.object.fail("beta_fast and beta_slow must be positive");
  rope.truncate = !s.object.is_null("truncate") && s.object.get<bool>("truncate", true);
  if (rope.theta == 1) s.object.fail("yarn has no meaning where rope_theta is 1");
}

struct RopeType {
  const char* name;
  RopeConfig::Scaling scaling;
  void (*read)(const Source& source, RopeConfig& rope);
};

constexpr RopeType kRopeTypes[] = {
    {"default", RopeConfig::Scaling::none, read_default},    {"linear", RopeConfig::Scaling::linear, read_linear},
    {"dynamic", RopeConfig::Scaling::dynamic, read_dynamic}, {"llama3", RopeConfig::Scaling::llama3, read_llama3},
    {"yarn", RopeConfig::Scaling::yarn, read_yarn},
};

/// Fields of one type are left alone by another; `finetuned` is a note of early YaRN models.
void refuse_unknown(const ConfigFile& object) {
  object.ignore({"attention_factor", "beta_fast", "beta_slow", "factor", "finetuned", "high_freq_factor", "long_factor",
                 "low_freq_factor", "mscale", "mscale_all_dim", "original_max_position_embeddings", "rope_type",
                 "short_factor", "truncate", "type"});
  object.done();
}

const RopeType& rope_type(const ConfigFile& object) {
  const char* key = object.contains("rope_type") ? "rope_type" : "type";
  const auto name = object.get<std::string>(key, "default");
  std::vector<std::string> known;
  for (const RopeType& type : kRopeTypes) {
    if (name == type.name) return type;
    known.emplace_back(type.name);
  }
  object.refuse(fmt::format("{} is {}, not one of {}", key, shown(name), fmt::join(known, ", ")));
}

}  // namespace

RopeConfig rope_config(const ConfigFile& file, int64_t head_dim, int64_t max_positions) {
  const ConfigFile object = rope_object(file);
  RopeConfig rope;
  file.ignore({"original_max_position_embeddings", "partial_rotary_factor", "rope_theta"});
  const ConfigFile& of_theta = object.contains("rope_theta") ? object : file;
  if (of_theta.contains("rope_theta")) rope.theta = of_theta.get_positive("rope_theta");
  const bool inside = object.contains("partial_rotary_factor");
  const auto turned = inside ? object.get<double>("partial_rotary_factor")
                             : file.get_optional<double>("partial_rotary_factor").value_or(1);
  if (turned != 1) file.refuse(fmt::format("partial_rotary_factor is {}, not 1", turned));
  const RopeType& type = rope_type(object);
  rope.scaling = type.scaling;
  type.read({file, object, max_positions}, rope);
  refuse_unknown(object);
  const std::vector<double> frequencies = rope_frequencies(rope, head_dim);
  const auto fits = [](double number) { return std::abs(number) < std::numeric_limits<float>::max(); };
  if (!fits(rope.attention_factor) || !std::all_of(frequencies.begin(), frequencies.end(), fits)) {
    object.fail("its numbers give no finite rotary frequencies");
  }
  return rope;
}

}  // namespace corank
