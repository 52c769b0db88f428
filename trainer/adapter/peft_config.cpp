#include "trainer/adapter/peft_config.h"

#include <fmt/format.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

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
                                                                {"fan_in_fan_out", false},
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

std::vector<std::pair<std::string, double>> parse_pattern(const ordered_json& config, const char* key) {
  std::vector<std::pair<std::string, double>> pattern;
  if (!config.contains(key) || config[key].is_null()) return pattern;
  for (const auto& [name, value] : config[key].items()) pattern.emplace_back(name, value.get<double>());
  return pattern;
}

ModulePattern parse_modules(const ordered_json& value) {
  ModulePattern pattern;
  if (value.is_string()) pattern.expression = value.get<std::string>();
  if (value.is_array()) pattern.names = value.get<std::vector<std::string>>();
  return pattern;
}

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

AdaLoraConfig parse_adalora(const ordered_json& config) {
  AdaLoraConfig c;
  c.init_r = config.value("init_r", c.init_r);
  c.target_r = config.value("target_r", c.target_r);
  c.tinit = config.value("tinit", c.tinit);
  c.tfinal = config.value("tfinal", c.tfinal);
  c.deltaT = config.value("deltaT", c.deltaT);
  c.beta1 = config.value("beta1", c.beta1);
  c.beta2 = config.value("beta2", c.beta2);
  c.orth_reg_weight = config.value("orth_reg_weight", c.orth_reg_weight);
  c.total_step = config.value("total_step", c.total_step);
  if (!config.contains("rank_pattern") || config["rank_pattern"].is_null()) return c;
  for (const auto& [name, ranks] : config["rank_pattern"].items()) {
    const size_t end = name.rfind(kE);
    c.kept_ranks[name.substr(0, end)] = ranks.get<std::vector<bool>>();
  }
  return c;
}

}  // namespace

std::string peft_config_json(const AdapterConfig& config, const std::vector<std::string>& modules,
                             const std::string& base_model) {
  json fields{{"auto_mapping", nullptr},
              {"base_model_name_or_path", base_model},
              {"bias", "none"},
              {"fan_in_fan_out", false},
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
  const auto fail = [&](const std::string& what) { throw InputError(fmt::format("{}: {}", origin, what)); };
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
  try {
    c.method = adalora                           ? "adalora"
               : config.value("use_dora", false) ? "dora"
               : config.value("use_mora", false) ? "mora"
                                                 : "lora";
    c.mora_type = config.value("mora_type", c.mora_type);
    if (config.contains("modules_to_save") && !config["modules_to_save"].is_null()) {
      c.modules_to_save = config["modules_to_save"].get<std::vector<std::string>>();
    }
    c.r = config.value("r", c.r);
    c.lora_alpha = config.value("lora_alpha", 8.0);  // PEFT's default, not ours
    c.lora_dropout = config.value("lora_dropout", 0.0);
    c.use_rslora = config.value("use_rslora", false);
    c.target_modules = parse_modules(config.value("target_modules", ordered_json()));
    c.all_linear = false;
    c.exclude_modules = parse_modules(config.value("exclude_modules", ordered_json()));
    if (adalora) {
      c.adalora = parse_adalora(config);
    } else {
      c.rank_pattern = parse_pattern(config, "rank_pattern");
      c.alpha_pattern = parse_pattern(config, "alpha_pattern");
    }
  } catch (const nlohmann::json::exception& e) {
    fail(e.what());
  }
  if (c.target_modules.empty()) fail("target_modules is missing");
  check(c, origin + ": adapter");
  return c;
}

}  // namespace corank
