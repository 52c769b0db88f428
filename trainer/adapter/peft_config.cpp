#include "trainer/adapter/peft_config.h"

#include <fmt/format.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <set>
#include <type_traits>

namespace corank {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

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

/// Fields of adapter_config.json that change the forward pass and must have the given value to be loadable.
const std::vector<std::pair<const char*, json>>& required_fields() {
  static const std::vector<std::pair<const char*, json>> fields{{"bias", "none"},
                                                                {"lora_bias", false},
                                                                {"layer_replication", nullptr},
                                                                {"layers_to_transform", nullptr},
                                                                {"layers_pattern", nullptr},
                                                                {"trainable_token_indices", nullptr},
                                                                {"target_parameters", nullptr},
                                                                {"use_qalora", false},
                                                                {"alora_invocation_tokens", nullptr},
                                                                {"use_bdlora", nullptr}};
  return fields;
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

AdapterConfig parse_peft_config(const std::string& text, const std::string& origin) {
  const auto config = ordered_json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) throw InputError(origin + ": not a JSON object");
  const PeftFile file(config, origin);
  const auto fail = [&](const std::string& what) { file.fail(what); };
  const ordered_json type = config.value("peft_type", ordered_json());
  const bool adalora = type == "ADALORA";
  if (!adalora && type != "LORA")
    fail(fmt::format("peft_type is {}, only LORA and ADALORA can be loaded", type.dump()));
  for (const auto& [key, value] : required_fields()) {
    if (config.contains(key) && !config[key].is_null() && json(config[key]) != value) {
      fail(fmt::format("{} is {}; it changes the result and only {} is supported", key, config[key].dump(),
                       value.dump()));
    }
  }
  const auto task = config.value("task_type", ordered_json());
  if (!task.is_null() && task != "CAUSAL_LM")
    fail(fmt::format("task_type is {}, only CAUSAL_LM is supported", task.dump()));
  // On load these need nothing but the tensors; pissa, olora, loftq and the like would change the base model.
  const auto init = config.value("init_lora_weights", ordered_json(true));
  if (!init.is_boolean() && init != "gaussian" && init != "orthogonal" && init != "eva") {
    fail(fmt::format(
        "init_lora_weights is {}, which changes the base model on load; convert the adapter to plain LoRA first",
        init.dump()));
  }
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
  c.all_linear = false;
  c.exclude_modules = file.modules("exclude_modules");
  if (adalora) {
    c.adalora = parse_adalora(file);
  } else {
    c.rank_pattern = file.pattern("rank_pattern");
    c.alpha_pattern = file.pattern("alpha_pattern");
  }
  if (c.target_modules.empty()) fail("target_modules is missing");
  check(c, [&](const std::string& key, const std::string& what) { fail(key + ": " + what); });
  return c;
}

}  // namespace corank
