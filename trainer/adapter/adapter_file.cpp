#include "trainer/adapter/adapter_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "data/file.h"
#include "data/h5.h"
#include "data/safetensors.h"

namespace corank {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

constexpr int64_t kMaxConfigBytes = int64_t{1} << 24;
constexpr const char* kPrefix = "base_model.model.";
constexpr const char* kFormat = "corank-adapter";

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
  static const std::vector<std::pair<const char*, json>> fields{{"use_dora", false},
                                                                {"bias", "none"},
                                                                {"lora_bias", false},
                                                                {"modules_to_save", nullptr},
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

/// PEFT's spellings of one tensor -> the name corank uses.
std::string canonical_name(std::string name) {
  if (name.starts_with("_orig_mod.")) name.erase(0, 10);
  if (!name.starts_with(kPrefix)) name.insert(0, kPrefix);
  for (const char* side : {".lora_A.default.weight", ".lora_B.default.weight"}) {
    if (name.ends_with(side)) name.erase(name.size() - 15, 8);
  }
  return name;
}

AdapterFile read_peft_folder(const std::string& folder) {
  AdapterFile adapter;
  const std::string config_path = folder + "/adapter_config.json";
  const std::string text = read_file(config_path, kMaxConfigBytes);
  adapter.config = parse_peft_config(text, config_path);
  adapter.base_model = json::parse(text).value("base_model_name_or_path", json()).is_string()
                           ? json::parse(text)["base_model_name_or_path"].get<std::string>()
                           : "";
  const SafetensorsFile file(folder + "/adapter_model.safetensors");
  for (const auto& entry : file.tensors())
    adapter.tensors.emplace_back(canonical_name(entry.first), file.read(entry.first));
  return adapter;
}

AdapterFile read_h5(const std::string& path) {
  const h5::Reader file(path);
  if (!file.has_attribute("format") || file.attribute_string("format") != kFormat) {
    throw InputError(path + ": not an adapter file of corank (attribute format is missing or another).");
  }
  if (file.attribute_string("method") == "full") {
    throw InputError(path +
                     ": holds the weights of a full fine-tuning, not an adapter. Use the run's model folder instead.");
  }
  AdapterFile adapter;
  adapter.config = parse_peft_config(file.attribute_string("adapter_config"), path);
  adapter.base_model = file.attribute_string("base_model");
  for (const std::string& name : file.names())
    adapter.tensors.emplace_back(name.substr(name.find_first_not_of('/')), file.read(name));
  return adapter;
}

std::string model_card(const AdapterFile& adapter) {
  return fmt::format(
      "---\nbase_model: {}\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- lora\n---\n\n"
      "A LoRA adapter for `{}`, rank {}, alpha {}, trained with corank.\n\n"
      "    from peft import PeftModel\n    model = PeftModel.from_pretrained(base_model, \"this folder\")\n",
      adapter.base_model, adapter.base_model, adapter.config.r, adapter.config.lora_alpha);
}

}  // namespace

std::string peft_config_json(const AdapterConfig& config, const std::vector<std::string>& modules,
                             const std::string& base_model) {
  json ranks = json::object(), alphas = json::object();
  for (const std::string& module : modules) {
    if (config.rank_of(module) != config.r) ranks[module] = config.rank_of(module);
    if (config.alpha_of(module) != config.lora_alpha) alphas[module] = number(config.alpha_of(module));
  }
  const bool gaussian = config.init_lora_weights == "gaussian";
  const json fields{{"alpha_pattern", alphas},
                    {"auto_mapping", nullptr},
                    {"base_model_name_or_path", base_model},
                    {"bias", "none"},
                    {"fan_in_fan_out", config.fan_in_fan_out},
                    {"inference_mode", true},
                    {"init_lora_weights", gaussian ? json("gaussian") : json(true)},
                    {"layers_pattern", nullptr},
                    {"layers_to_transform", nullptr},
                    {"lora_alpha", number(config.lora_alpha)},
                    {"lora_dropout", config.lora_dropout},
                    {"modules_to_save", nullptr},
                    {"peft_type", "LORA"},
                    {"r", config.r},
                    {"rank_pattern", ranks},
                    {"revision", nullptr},
                    {"target_modules", target_list(config, modules)},
                    {"task_type", "CAUSAL_LM"},
                    {"use_dora", false},
                    {"use_rslora", config.use_rslora}};
  return fields.dump(2) + "\n";
}

AdapterConfig parse_peft_config(const std::string& text, const std::string& origin) {
  const auto config = ordered_json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) throw InputError(origin + ": not a JSON object");
  const auto fail = [&](const std::string& what) { throw InputError(fmt::format("{}: {}", origin, what)); };
  if (config.value("peft_type", ordered_json()) != "LORA") {
    fail(fmt::format("peft_type is {}, only LORA can be loaded", config.value("peft_type", ordered_json()).dump()));
  }
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
    c.r = config.value("r", c.r);
    c.lora_alpha = config.value("lora_alpha", 8.0);  // PEFT's default, not ours
    c.lora_dropout = config.value("lora_dropout", 0.0);
    c.use_rslora = config.value("use_rslora", false);
    c.fan_in_fan_out = config.value("fan_in_fan_out", false);
    c.target_modules = parse_modules(config.value("target_modules", ordered_json()));
    c.all_linear = false;
    c.exclude_modules = parse_modules(config.value("exclude_modules", ordered_json()));
    c.rank_pattern = parse_pattern(config, "rank_pattern");
    c.alpha_pattern = parse_pattern(config, "alpha_pattern");
  } catch (const nlohmann::json::exception& e) {
    fail(e.what());
  }
  if (c.target_modules.empty()) fail("target_modules is missing");
  check(c, origin + ": adapter");
  return c;
}

AdapterFile read_adapter(const std::string& path) {
  namespace fs = std::filesystem;
  if (fs::exists(fs::path(path) / "adapter_config.json")) return read_peft_folder(path);
  if (fs::exists(fs::path(path) / "adapter.h5")) return read_h5(path + "/adapter.h5");
  if (fs::is_regular_file(path)) return read_h5(path);
  throw MissingError(
      fmt::format("{}: no adapter here. Name a PEFT folder (adapter_config.json), a checkpoint folder or an "
                  "adapter.h5 file.",
                  path));
}

void load_tensors(const AdapterFile& adapter, ParameterStore& store) {
  std::set<std::string> expected;
  for (const auto& p : store.parameters()) expected.insert(p.spec.name);
  for (const auto& [name, tensor] : adapter.tensors) {
    if (!expected.erase(name)) {
      throw InputError(
          fmt::format("the adapter holds tensor {}, which the run has no place for. Its targets or its base model "
                      "are not the run's.",
                      name));
    }
    store.load(name, tensor);
  }
  if (!expected.empty()) {
    throw InputError(
        fmt::format("the adapter lacks {} tensors of the run, the first is {}. Its targets or its base model are "
                    "not the run's.",
                    expected.size(), *expected.begin()));
  }
  store.refresh();
}

std::vector<std::string> adapted_modules(const AdapterFile& adapter) {
  std::vector<std::string> modules;
  std::set<std::string> seen;
  for (const auto& [name, tensor] : adapter.tensors) {
    const size_t end = name.find(".lora_");
    if (!name.starts_with(kPrefix) || end == std::string::npos) throw InputError("not a LoRA tensor name: " + name);
    const std::string module = name.substr(std::string(kPrefix).size(), end - std::string(kPrefix).size());
    if (seen.insert(module).second) modules.push_back(module);
  }
  return modules;
}

void write_peft_folder(const std::string& folder, const AdapterFile& adapter) {
  make_folders(folder);
  auto tensors = adapter.tensors;
  std::sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  write_file_atomically(folder + "/adapter_model.safetensors", safetensors_image(tensors));
  write_file_atomically(folder + "/README.md", model_card(adapter));
  write_file_atomically(folder + "/adapter_config.json",
                        peft_config_json(adapter.config, adapted_modules(adapter), adapter.base_model));
}

std::string adapter_h5_image(const AdapterFile& adapter) {
  h5::Writer file;
  file.attribute("format", kFormat);
  file.attribute("version", int64_t{1});
  file.attribute("base_model", adapter.base_model);
  file.attribute("method", adapter.config.method);
  if (adapter.config.method != "full") {
    file.attribute("adapter_config", peft_config_json(adapter.config, adapted_modules(adapter), adapter.base_model));
  }
  for (const auto& [name, tensor] : adapter.tensors) file.write(name, tensor);
  return file.finish();
}

AdapterConfig merge_with_file(const AdapterConfig& run, const std::vector<std::string>& written,
                              const AdapterConfig& file, const std::vector<std::string>& linears) {
  const auto is_written = [&](const char* key) {
    return std::find(written.begin(), written.end(), key) != written.end();
  };
  const auto compare = [&](const char* key, const auto& ours, const auto& theirs) {
    if (is_written(key) && ours != theirs) {
      throw ConfigError(
          fmt::format("adapter.{}: the run file says {}, {} says {}. Leave it out of the run file to take the "
                      "adapter's.",
                      key, ours, run.path, theirs));
    }
  };
  const std::vector<std::string> modules = select_targets(file, linears);
  compare("method", run.method, file.method);
  compare("use_rslora", run.use_rslora, file.use_rslora);
  if (is_written("target_modules") && select_targets(run, linears) != modules) {
    throw ConfigError(
        fmt::format("adapter.target_modules: the run file's targets are not those of {} ([{}]). Leave it out of "
                    "the run file to take the adapter's.",
                    run.path, fmt::join(modules, ", ")));
  }
  for (const std::string& module : modules) {
    if (is_written("r") || is_written("rank_pattern")) compare("r", run.rank_of(module), file.rank_of(module));
    if (is_written("lora_alpha") || is_written("alpha_pattern")) {
      compare("lora_alpha", run.alpha_of(module), file.alpha_of(module));
    }
  }
  AdapterConfig merged = file;
  merged.path = run.path;
  merged.lora_dropout = is_written("lora_dropout") ? run.lora_dropout : file.lora_dropout;
  return merged;
}

}  // namespace corank
