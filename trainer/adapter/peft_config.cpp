#include "trainer/adapter/peft_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>
#include <type_traits>

namespace corank {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

std::string lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
  return text;
}

std::string kind_of(const std::string& module) { return module.substr(module.rfind('.') + 1); }

/// As short as is exact: the kinds of all linears, the list of the run file, else full names.
std::vector<std::string> target_list(const AdapterConfig& config, const std::vector<std::string>& modules) {
  std::set<std::string> names;
  if (!config.exclude_modules.empty() || (!config.all_linear && config.target_modules.names.empty())) {
    names.insert(modules.begin(), modules.end());
  } else if (config.all_linear) {
    for (const std::string& module : modules) names.insert(kind_of(module));
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

/// Those that parse_peft_config reads.
constexpr const char* kReadFields[] = {"peft_type",
                                       "task_type",
                                       "r",
                                       "lora_alpha",
                                       "lora_dropout",
                                       "use_rslora",
                                       "use_dora",
                                       "use_mora",
                                       "mora_type",
                                       "remora_types",
                                       "fan_in_fan_out",
                                       "target_modules",
                                       "exclude_modules",
                                       "rank_pattern",
                                       "alpha_pattern",
                                       "modules_to_save",
                                       "layers_pattern",
                                       "target_r",
                                       "layers_to_transform",
                                       "init_r",
                                       "init_lora_weights",
                                       "tinit",
                                       "tfinal",
                                       "deltaT",
                                       "beta1",
                                       "beta2",
                                       "orth_reg_weight",
                                       "total_step"};

bool is_off(const ordered_json& value) {
  return value.is_null() || value == false || value == "" || (value.is_structured() && value.empty());
}

/// null is absent.
std::string refusal(const std::string& key, const ordered_json& value) {
  const auto field = std::find_if(other_fields().begin(), other_fields().end(),
                                  [&](const OtherField& one) { return key == one.name; });
  const std::string shown = value.dump().substr(0, 80);
  if (field == other_fields().end()) {
    if (is_off(value)) return "";
    return fmt::format(
        "{} is {}, and no field of this name is known; it may change the result. Remove it from the file if it does "
        "not",
        key, shown);
  }
  const auto& accepted = field->accepted;
  if (!field->why || value.is_null() || std::find(accepted.begin(), accepted.end(), json(value)) != accepted.end())
    return "";
  return fmt::format("{} is {}: {}, which is not supported", key, shown, field->why);
}

/// adapter_config.json, with its name and the key in every message. null reads as absent.
class PeftFile {
 public:
  PeftFile(const ordered_json& root, const std::string& origin) : root_(root), origin_(origin) {}

  [[noreturn]] void fail(const std::string& what) const { throw InputError(fmt::format("{}: {}", origin_, what)); }
  bool has(const char* key) const { return root_.contains(key) && !root_[key].is_null(); }

  template <class T>
  T get(const char* key, T default_value) const {
    return has(key) ? convert<T>(root_[key], key) : default_value;
  }
  std::vector<std::pair<std::string, double>> pattern(const char* key) const {
    std::vector<std::pair<std::string, double>> result;
    for (const auto& [name, value] : object(key).items()) result.emplace_back(name, convert<double>(value, key));
    return result;
  }
  ModulePattern modules(const char* key) const {
    if (has(key) && root_[key].is_string()) return {{}, root_[key].get<std::string>()};
    return {get<std::vector<std::string>>(key, {}), ""};
  }
  /// One value is a list of it.
  template <class T>
  std::vector<T> list(const char* key) const {
    if (!has(key)) return {};
    if (!root_[key].is_array()) return {convert<T>(root_[key], key)};
    std::vector<T> values;
    for (const ordered_json& value : root_[key]) values.push_back(convert<T>(value, key));
    return values;
  }
  const ordered_json& object(const char* key) const {  // a reference: items() of a temporary would dangle
    static const ordered_json none = ordered_json::object();
    if (!has(key)) return none;
    if (!root_[key].is_object()) refuse(root_[key], key);
    return root_[key];
  }
  template <class T>
  T convert(const ordered_json& value, const char* key) const {
    if constexpr (std::is_same_v<T, int64_t>) {  // the library would cut fractions
      if (!value.is_number_integer()) refuse(value, key);
    } else if constexpr (std::is_same_v<T, double>) {
      if (!value.is_number()) refuse(value, key);
    }
    try {
      return value.get<T>();
    } catch (const json::exception&) {
      refuse(value, key);
    }
  }

 private:
  [[noreturn]] void refuse(const ordered_json& value, const char* key) const {
    fail(fmt::format("{} has the wrong type: {}", key, value.dump().substr(0, 80)));
  }
  const ordered_json& root_;
  const std::string& origin_;
};

json lora_fields(const AdapterConfig& config, const std::vector<std::string>& modules) {
  json ranks = json::object(), alphas = json::object();
  for (const std::string& module : modules) {
    if (config.rank_of(module) != config.r) ranks[module] = config.rank_of(module);
    if (config.alpha_of(module) != config.lora_alpha) alphas[module] = number(config.alpha_of(module));
  }
  const bool gaussian = config.init_lora_weights == "gaussian";
  json fields{{"peft_type", "LORA"},
              {"alpha_pattern", alphas},
              {"init_lora_weights", gaussian ? json("gaussian") : json(true)},
              {"r", config.r},
              {"rank_pattern", ranks},
              {"use_dora", config.method == "dora"},
              {"use_rslora", config.use_rslora}};
  if (config.method == "mora") fields.update({{"use_mora", true}, {"mora_type", config.mora_type}});
  if (!config.remora.types.empty()) fields["remora_types"] = config.remora.types;
  return fields;
}

constexpr const char* kE = ".lora_E";

json adalora_fields(const AdaLoraConfig& c) {
  json kept;  // null before ranks were chosen
  for (const auto& [module, ranks] : c.kept_ranks) kept[module + kE] = ranks;
  return {{"peft_type", "ADALORA"},
          {"r", 8},
          {"init_lora_weights", true},
          {"init_r", c.init_r},
          {"target_r", c.target_r},
          {"tinit", c.tinit},
          {"tfinal", c.tfinal},
          {"deltaT", c.deltaT},
          {"beta1", c.beta1},
          {"beta2", c.beta2},
          {"orth_reg_weight", c.orth_reg_weight},
          {"total_step", c.total_step},
          {"rank_pattern", kept}};
}

AdaLoraConfig parse_adalora(const PeftFile& file) {
  AdaLoraConfig c;
  c.init_r = file.get("init_r", c.init_r);
  c.target_r = file.get("target_r", c.target_r);
  c.tinit = file.get("tinit", c.tinit);
  c.tfinal = file.get("tfinal", c.tfinal);
  c.deltaT = file.get("deltaT", c.deltaT);
  c.beta1 = file.get("beta1", c.beta1);
  c.beta2 = file.get("beta2", c.beta2);
  c.orth_reg_weight = file.get("orth_reg_weight", c.orth_reg_weight);
  c.total_step = file.get("total_step", c.total_step);
  for (const auto& [name, ranks] : file.object("rank_pattern").items()) {
    c.kept_ranks[name.substr(0, name.rfind(kE))] = file.convert<std::vector<bool>>(ranks, "rank_pattern");
  }
  return c;
}

bool is_adalora(const PeftFile& file, const ordered_json& config) {
  const ordered_json type = config.value("peft_type", ordered_json());
  if (type != "LORA" && type != "ADALORA") {
    file.fail(fmt::format("peft_type is {}, only LORA and ADALORA can be loaded", type.dump()));
  }
  return type == "ADALORA";
}

/// What changes the result is read elsewhere or refused here.
void require_supported(const PeftFile& file, const ordered_json& config) {
  for (const auto& [key, value] : config.items()) {
    const bool is_read = std::find(std::begin(kReadFields), std::end(kReadFields), key) != std::end(kReadFields);
    if (const std::string why = is_read ? "" : refusal(key, value); !why.empty()) file.fail(why);
  }
  if (const auto task = file.get<std::string>("task_type", "CAUSAL_LM"); task != "CAUSAL_LM") {
    file.fail(fmt::format("task_type is {}, only CAUSAL_LM is supported", task));
  }
  const bool adalora = is_adalora(file, config), dora = file.get("use_dora", false), mora = file.get("use_mora", false);
  if (adalora + dora + mora > 1) {
    file.fail("peft_type ADALORA, use_dora and use_mora are methods of their own; only one can be meant");
  }
  // On load these need nothing but the tensors; pissa, olora, corda, loftq and lora_ga change the base model.
  ordered_json init = config.value("init_lora_weights", ordered_json(true));
  if (init.is_string()) init = lower(init.get<std::string>());
  if (init.is_null() || init.is_boolean() || init == "gaussian" || init == "orthogonal" || init == "eva" ||
      init == "mica") {
    return;
  }
  file.fail(fmt::format(
      "init_lora_weights is {}, which changes the base model; convert the adapter to plain LoRA first (PEFT: "
      "save_pretrained with path_initial_model_for_weight_conversion)",
      init.dump()));
}

/// PEFT's rule for layers_to_transform: a target named in full stays; others where the first number in the name, after
/// a name of layers_pattern if there is one, is listed.
void choose_layers(const PeftFile& file, const std::vector<std::string>& modules, ModulePattern& targets) {
  const std::vector<int64_t> layers = file.list<int64_t>("layers_to_transform");
  const std::vector<std::string> patterns = file.list<std::string>("layers_pattern");
  const bool chooses = file.has("layers_to_transform");
  if (!patterns.empty() && !chooses) file.fail("layers_pattern is set without layers_to_transform");
  if (!targets.expression.empty() && chooses)
    file.fail("layers_to_transform is set beside a target_modules that is no list");
  if (layers.empty()) return;
  const std::regex layer(patterns.empty() ? R"(.*?\.[^.]*\.(\d+)\..*)"
                                          : fmt::format(R"((?:|.*?\.)(?:{})\.(\d+)\..*)", fmt::join(patterns, "|")));
  std::vector<std::string> chosen;
  for (const std::string& module : modules) {
    std::smatch found;
    const bool listed = std::regex_match(module, found, layer) &&
                        std::count(layers.begin(), layers.end(), std::stoll(found[1].str())) > 0;
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
  fields.update(config.method == "adalora" ? adalora_fields(config.adalora) : lora_fields(config, modules));
  return fields.dump(2) + "\n";
}

AdapterConfig parse_peft_config(const std::string& text, const std::string& origin,
                                const std::vector<std::string>& modules) {
  const auto config = ordered_json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) throw InputError(origin + ": not a JSON object");
  const PeftFile file(config, origin);
  const bool adalora = is_adalora(file, config);
  require_supported(file, config);
  AdapterConfig c;
  c.method = adalora ? "adalora" : file.get("use_dora", false) ? "dora" : file.get("use_mora", false) ? "mora" : "lora";
  c.mora_type = file.get("mora_type", c.mora_type);
  c.remora.types = file.get("remora_types", c.remora.types);
  c.modules_to_save = file.get("modules_to_save", c.modules_to_save);
  c.r = file.get("r", c.r);
  c.lora_alpha = file.get("lora_alpha", 8.0);  // PEFT's default, not ours
  c.lora_dropout = file.get("lora_dropout", 0.0);
  c.use_rslora = file.get("use_rslora", false);
  c.fan_in_fan_out = file.get("fan_in_fan_out", false);
  c.target_modules = file.modules("target_modules");
  if (c.target_modules.empty()) file.fail("target_modules is missing");
  choose_layers(file, modules, c.target_modules);
  c.all_linear = is_all_linear(c.target_modules.expression);
  c.exclude_modules = file.modules("exclude_modules");
  if (adalora) {
    c.adalora = parse_adalora(file);
  } else {
    c.rank_pattern = file.pattern("rank_pattern");
    c.alpha_pattern = file.pattern("alpha_pattern");
  }
  check(c, [&](const std::string& key, const std::string& what) { file.fail(key + ": " + what); });
  return c;
}

}  // namespace corank
