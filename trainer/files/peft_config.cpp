#include "trainer/files/peft_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "data/json_object.h"
#include "trainer/methods/methods.h"
#include "trainer/methods/targets.h"

namespace corank {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

std::string lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
  return text;
}

std::string last_name(const std::string& module) { return module.substr(module.rfind('.') + 1); }

/// As short as is exact: the kinds of all linears, the list of the run file, else full names.
std::vector<std::string> target_list(const AdapterConfig& config, const std::vector<std::string>& modules) {
  std::set<std::string> names;
  if (!config.exclude_modules.empty() || (!config.all_linear && config.target_modules.names.empty())) {
    names.insert(modules.begin(), modules.end());
  } else if (config.all_linear) {
    for (const std::string& module : modules) names.insert(last_name(module));
  } else {
    names.insert(config.target_modules.names.begin(), config.target_modules.names.end());
  }
  return {names.begin(), names.end()};
}

/// Numbers that are whole are written without a fraction, as PEFT users write them.
json number(double value) {
  if (value == std::floor(value) && std::abs(value) < 1e15) return static_cast<int64_t>(value);
  return value;
}

/// A field of adapter_config.json that is not read.
struct OtherField {
  const char* name;
  std::vector<json> accepted;  ///< beside null; other values are refused
  const char* why;             ///< of the refusal; null: harmless, any value is accepted
};

const std::vector<OtherField>& other_fields() {
  static const std::vector<OtherField> fields{
      {"bias", {"none"}, "biases of the base model train with it"},
      {"lora_bias", {false}, "B has a bias"},
      {"layer_replication", {json::array()}, "the model's layers are repeated"},
      {"trainable_token_indices", {json::array(), json::object()}, "rows of the embedding train with it"},
      {"target_parameters", {json::array()}, "it adapts parameters that are no linears"},
      {"use_qalora", {false}, "inputs are pooled by group (QA-LoRA)"},
      {"alora_invocation_tokens", {json::array()}, "it acts only after certain tokens (aLoRA)"},
      {"use_bdlora", {}, "its factors are block-diagonal (BD-LoRA)"},
      {"arrow_config", {}, "it is a router over other adapters (Arrow)"},
      {"kasa_config", {}, "the base weights lose their least singular values (KaSA)"},
      {"velora_config", {}, "its gradients are approximated (VeLoRA)"},
      {"monteclora_config", {}, "its factors are drawn at random (MonteCLoRA)"},
      {"megatron_config", {}, "its linears are Megatron's"},
      {"ensure_weight_tying", {false}, "what it trains of the embedding is tied to the head"},
      {"auto_mapping", {}, nullptr},
      {"base_model_name_or_path", {}, nullptr},
      {"revision", {}, nullptr},
      {"peft_version", {}, nullptr},
      {"inference_mode", {}, nullptr},
      {"runtime_config", {}, nullptr},
      {"megatron_core", {}, nullptr},      // of megatron_config
      {"qalora_group_size", {}, nullptr},  // of use_qalora
      {"loftq_config", {}, nullptr},       // these four only for the first values, which the file's replace
      {"eva_config", {}, nullptr},
      {"corda_config", {}, nullptr},
      {"lora_ga_config", {}, nullptr},
  };
  return fields;
}

bool is_off(const ordered_json& value) {
  return value.is_null() || value == false || value == "" || (value.is_structured() && value.empty());
}

/// Why a field that parse_peft_config did not read may change the result; empty: it does not.
std::string peft_refusal(const std::string& key, const ordered_json& value) {
  const auto field = std::find_if(other_fields().begin(), other_fields().end(),
                                  [&](const OtherField& one) { return key == one.name; });
  if (field == other_fields().end()) {
    if (is_off(value)) return "";
    return fmt::format(
        "{} is {}, and no field of this name is known; it may change the result. Remove it from the file if it does "
        "not",
        key, shown(value));
  }
  const auto& accepted = field->accepted;
  if (!field->why || value.is_null() || std::find(accepted.begin(), accepted.end(), json(value)) != accepted.end())
    return "";
  return fmt::format("{} is {}: {}, which is not supported", key, shown(value), field->why);
}

PatternPlace place_of(const JsonObject& file, const std::string& key) { return {file.origin() + ": " + key, true}; }

ModuleValues read_peft_pattern(const JsonObject& file, const std::string& key) {
  std::vector<std::pair<std::string, double>> entries;
  if (file.has(key)) {
    const auto object = file.get<JsonObject>(key);
    for (const auto& [name, value] : object.root().items())
      entries.emplace_back(name, object.convert<double>(value, name));
  }
  return module_values(entries, place_of(file, key));
}

/// One value is a list of it.
template <class T>
std::vector<T> read_list(const JsonObject& file, const std::string& key) {
  if (!file.has(key) || file.value(key).is_array()) return file.get<std::vector<T>>(key, {});
  return {file.get<T>(key)};
}

ModulePattern read_modules(const JsonObject& file, const std::string& key) {
  if (!file.value(key).is_string()) return {file.get<std::vector<std::string>>(key, {}), {}};
  const auto text = file.get<std::string>(key);
  if (text.empty()) return {};
  return {{}, NamePattern(text, place_of(file, key))};
}

/// As they stand in the file of a LoRA.
json lora_fields(const AdapterConfig& config, const std::vector<std::string>& modules) {
  json ranks = json::object(), alphas = json::object();
  for (const std::string& module : modules) {
    if (config.rank_of(module) != config.r) ranks[module] = config.rank_of(module);
    if (config.alpha_of(module) != config.lora_alpha) alphas[module] = number(config.alpha_of(module));
  }
  const bool gaussian = config.init_lora_weights == "gaussian";
  return {{"peft_type", MethodEntry::kPlainType},
          {"alpha_pattern", alphas},
          {"init_lora_weights", gaussian ? json("gaussian") : json(true)},
          {"r", config.r},
          {"rank_pattern", ranks},
          {"use_dora", false},
          {"use_rslora", config.use_rslora}};
}

/// a, b and c.
std::string enumeration(const std::set<std::string>& words) {
  const std::vector<std::string> list(words.begin(), words.end());
  if (list.size() < 2) return fmt::format("{}", fmt::join(list, ""));
  return fmt::format("{} and {}", fmt::join(list.begin(), list.end() - 1, ", "), list.back());
}

void require_known_type(const JsonObject& file) {
  std::vector<std::string> types;
  for (const MethodEntry* method : methods()) {
    if (!std::count(types.begin(), types.end(), method->peft_type())) types.push_back(method->peft_type());
  }
  const ordered_json& type = file.value("peft_type");
  if (type.is_string() && std::count(types.begin(), types.end(), type.get<std::string>())) return;
  file.fail(fmt::format("peft_type is {}, only {} can be loaded", shown(type), fmt::join(types, " and ")));
}

/// The method that the file says it is; LoRA's where it says none.
std::string method_of(const JsonObject& file) {
  require_known_type(file);
  const std::string plain_type = MethodEntry::kPlainType;
  std::vector<std::string> meant;
  std::set<std::string> signs;
  for (const MethodEntry* method : methods()) {
    const std::string type = method->peft_type(), key = method->peft_switch();
    const bool has_type = type != plain_type, has_key = !key.empty();
    if (has_type) signs.insert("peft_type " + type);
    if (has_key) signs.insert(key);
    const bool is_on = has_key && file.get(key, false);
    if (is_on || (has_type && file.value("peft_type") == type)) meant.push_back(method->name());
  }
  if (meant.size() > 1) {
    file.fail(fmt::format("{} are methods of their own; only one can be meant", enumeration(signs)));
  }
  return meant.empty() ? AdapterConfig().method : meant.front();
}

bool has_patterns(const std::string& method) {
  const std::vector<std::string> keys = method_entry(method).common_keys();
  return std::count(keys.begin(), keys.end(), "rank_pattern") > 0;
}

/// null is off where PEFT reads it so; these it cannot compute with.
void require_values(const JsonObject& file, const std::string& method) {
  std::vector<std::string> keys{"r", "lora_alpha", "lora_dropout", "bias"};
  for (const MethodEntry* any : methods()) {
    for (const OwnField& field : any->fields()) {
      if (!field.may_be_null) keys.push_back(field.name);
    }
  }
  if (has_patterns(method)) keys.insert(keys.end(), {"rank_pattern", "alpha_pattern"});
  for (const std::string& key : keys) {
    if (file.root().contains(key) && file.root()[key].is_null())
      file.fail(key + " is null. Write its value, or leave it out to take PEFT's default");
  }
}

/// On load these need nothing but the tensors; pissa, olora, corda, loftq and lora_ga change the base model.
void require_plain_start(const JsonObject& file) {
  ordered_json init = file.value("init_lora_weights");
  if (init.is_string()) init = lower(init.get<std::string>());
  if (init.is_null() || init.is_boolean() || init == "gaussian" || init == "orthogonal" || init == "eva" ||
      init == "mica") {
    return;
  }
  file.fail(fmt::format(
      "init_lora_weights is {}, which changes the base model; convert the adapter to plain LoRA first (PEFT: "
      "save_pretrained with path_initial_model_for_weight_conversion)",
      shown(init)));
}

/// What changes the result has been read, or is refused here.
void require_supported(const JsonObject& file) {
  require_plain_start(file);
  if (const auto task = file.get<std::string>("task_type", "CAUSAL_LM"); task != "CAUSAL_LM")
    file.fail(fmt::format("task_type is {}, only CAUSAL_LM is supported", shown(task)));
  // each belongs to one method, and to the others means nothing
  file.ignore({"rank_pattern", "alpha_pattern"});
  for (const MethodEntry* method : methods()) {
    for (const OwnField& field : method->fields()) file.ignore({field.name});
  }
  for (const std::string& key : file.unknown()) {
    if (const std::string why = peft_refusal(key, file.value(key)); !why.empty()) file.fail(why);
  }
}

/// The number of a module's layer as PEFT finds it: the first in the name, after one of `patterns` if there is one.
/// None where there is no number, or one that no layer can have.
std::optional<int64_t> layer_of(const std::string& module, const std::vector<Pattern>& patterns) {
  for (const Pattern& pattern : patterns) {
    const auto digits = pattern.group(module, "idx");
    if (!digits) continue;
    int64_t layer = 0;
    const auto [end, error] = std::from_chars(digits->data(), digits->data() + digits->size(), layer);
    if (error != std::errc()) return std::nullopt;
    return layer;
  }
  return std::nullopt;
}

std::vector<Pattern> layer_patterns(const JsonObject& file) {
  const std::string key = "layers_pattern", number = R"(\.(?P<idx>\d+)\.)";
  std::vector<std::string> names = read_list<std::string>(file, key);
  if (is_off(file.value(key))) names.clear();
  std::vector<Pattern> patterns;
  for (const std::string& name : names)
    patterns.emplace_back(name, "(?:^|.*?\\.)" + name + number, Pattern::Extent::start, place_of(file, key));
  if (names.empty()) patterns.emplace_back("", R"(.*?\.[^.]*)" + number, Pattern::Extent::start, place_of(file, key));
  return patterns;
}

/// PEFT's rule for layers_to_transform: a target named in full stays; others where their layer is listed.
void choose_layers(const JsonObject& file, const std::vector<std::string>& modules, ModulePattern& targets) {
  const auto layers = read_list<int64_t>(file, "layers_to_transform");
  const bool chooses = file.has("layers_to_transform"), has_pattern = !is_off(file.value("layers_pattern"));
  if (has_pattern && !chooses) file.fail("layers_pattern is set without layers_to_transform");
  if (targets.expression && chooses) file.fail("layers_to_transform is set beside a target_modules that is no list");
  if (layers.empty()) return;
  const std::vector<Pattern> patterns = layer_patterns(file);
  std::vector<std::string> chosen;
  for (const std::string& module : modules) {
    const std::optional<int64_t> layer = layer_of(module, patterns);
    const bool listed = layer && std::count(layers.begin(), layers.end(), *layer) > 0;
    const bool in_full = std::count(targets.names.begin(), targets.names.end(), module) > 0;
    if (in_full || (listed && targets.matches(module))) chosen.push_back(module);
  }
  if (chosen.empty()) file.fail("layers_to_transform leaves none of the modules");
  targets.names = chosen;
}

}  // namespace

std::string peft_config_json(const AdapterConfig& config, const std::vector<std::string>& modules,
                             const std::string& base_model) {
  json fields{{"auto_mapping", nullptr},
              {"base_model_name_or_path", base_model},
              {"bias", "none"},
              {"fan_in_fan_out", config.fan_in_fan_out},
              {"inference_mode", true},
              {"layers_pattern", nullptr},
              {"layers_to_transform", nullptr},
              {"lora_alpha", number(config.lora_alpha)},
              {"lora_dropout", config.lora_dropout},
              {"modules_to_save", config.modules_to_save.empty() ? json() : json(config.modules_to_save)},
              {"revision", nullptr},
              {"target_modules", target_list(config, modules)},
              {"task_type", "CAUSAL_LM"}};
  fields.update(lora_fields(config, modules));
  method_entry(config.method).write_fields(config, fields);
  return fields.dump(2) + "\n";
}

AdapterConfig parse_peft_config(const std::string& text, const std::string& origin,
                                const std::vector<std::string>& modules) {
  const JsonObject file(text, origin);
  AdapterConfig c;
  c.method = method_of(file);
  require_values(file, c.method);
  c.modules_to_save = file.get("modules_to_save", c.modules_to_save);
  c.r = file.get("r", c.r);
  c.lora_alpha = file.get("lora_alpha", 8.0);  // PEFT's default, not ours
  c.lora_dropout = file.get("lora_dropout", 0.0);
  c.use_rslora = file.get("use_rslora", false);
  c.fan_in_fan_out = file.get("fan_in_fan_out", false);
  c.target_modules = read_modules(file, "target_modules");
  if (c.target_modules.empty()) file.fail("target_modules is missing");
  choose_layers(file, modules, c.target_modules);
  c.all_linear = is_all_linear(c.target_modules);
  c.exclude_modules = read_modules(file, "exclude_modules");
  if (has_patterns(c.method)) {
    c.rank_pattern = read_peft_pattern(file, "rank_pattern");
    c.alpha_pattern = read_peft_pattern(file, "alpha_pattern");
  }
  for (const MethodEntry* method : methods()) method->read_fields(file, c);
  require_supported(file);
  check(c, [&](const std::string& key, const std::string& what) { file.fail(key + ": " + what); });
  return c;
}

}  // namespace corank
