#include "trainer/methods/config_keys.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "configs/writer.h"
#include "trainer/methods/methods.h"
#include "trainer/methods/targets.h"

namespace corank {
namespace {

bool is_in(const std::vector<std::string>& list, const std::string& name) {
  return std::count(list.begin(), list.end(), name) > 0;
}

/// A file named by adapter.path may bring another method than the run file's default: then merge_with_file asks.
void require_keys_of_method(const Section& section, const AdapterConfig& c) {
  if (!c.path.empty() && !section.has("method")) return;
  for (const AdapterKey& key : adapter_keys()) {
    if (!section.has(key.name) || key.in_every_file || key.of(c.method)) continue;
    section.fail(key.name,
                 fmt::format("belongs to method {}, this run's method is {}", fmt::join(key.methods, ", "), c.method));
  }
}

template <class T>
std::string plain(const T& value) {
  return fmt::format("{}", value);
}

std::string modules_yaml(const ModulePattern& p) {
  if (p.empty()) return "";
  return p.expression ? yaml::quoted(p.expression->text()) : yaml::list(p.names);
}

std::string values_yaml(const ModuleValues& entries) {
  std::vector<std::pair<std::string, double>> written;
  for (const auto& [key, value] : entries) written.emplace_back(key.text(), value);
  return yaml::map(written);
}

/// Keys that several methods have: each says which (MethodEntry::common_keys).
std::vector<AdapterKey> common_keys() {
  using C = const AdapterConfig&;
  return {
      {"r", [](C c) { return plain(c.r); }, true, {}},
      {"lora_alpha", [](C c) { return plain(c.lora_alpha); }, true, {}},
      {"lora_dropout", [](C c) { return plain(c.lora_dropout); }, true, {}},
      {"target_modules",
       [](C c) { return c.all_linear ? std::string("all-linear") : modules_yaml(c.target_modules); },
       true,
       {}},
      {"exclude_modules", [](C c) { return modules_yaml(c.exclude_modules); }, true, {}},
      {"use_rslora", [](C c) { return plain(c.use_rslora); }, false, {}},
      {"rank_pattern", [](C c) { return values_yaml(c.rank_pattern); }, false, {}},
      {"alpha_pattern", [](C c) { return values_yaml(c.alpha_pattern); }, false, {}},
      {"init_lora_weights", [](C c) { return yaml::quoted(c.init_lora_weights); }, false, {}},
      {"loraplus_lr_ratio", [](C c) { return plain(c.loraplus_lr_ratio); }, false, {}},
      {"modules_to_save",
       [](C c) { return c.modules_to_save.empty() ? std::string() : yaml::list(c.modules_to_save); },
       false,
       {}},
  };
}

ModuleValues read_values(const Section& section, const std::string& key) {
  if (!section.has(key)) return {};
  return module_values(section.get_ordered(key), {section.where(key)});
}

ModulePattern read_pattern(const Section& section, const std::string& key) {
  if (!section.has(key)) return {};
  if (section.is_list(key)) {
    const ModulePattern pattern{section.get<std::vector<std::string>>(key), {}};
    if (pattern.names.empty()) section.fail(key, "the list is empty");
    return pattern;
  }
  const std::string text = section.get<std::string>(key);
  if (text.empty()) section.fail(key, "the text is empty; leave it out");
  return {{}, NamePattern(text, {section.where(key)})};
}

}  // namespace

bool AdapterKey::of(const std::string& method) const { return methods.empty() || is_in(methods, method); }

std::vector<AdapterKey> adapter_keys() {
  std::vector<AdapterKey> keys{{"method", [](const AdapterConfig& c) { return c.method; }, false, {}}};
  for (AdapterKey& key : common_keys()) {
    for (const MethodEntry* method : methods()) {
      if (is_in(method->common_keys(), key.name)) key.methods.push_back(method->name());
    }
    keys.push_back(std::move(key));
  }
  for (const MethodEntry* method : methods()) {
    for (const OwnKey& own : method->keys()) keys.push_back({own.name, own.yaml, false, {method->name()}});
  }
  keys.push_back({"path",
                  [](const AdapterConfig& c) { return c.path.empty() ? std::string() : yaml::quoted(c.path); },
                  false,
                  {}});
  return keys;
}

std::vector<std::string> keys_of_adapters(const std::vector<std::string>& more) {
  std::vector<std::string> keys{"lora_dropout", "target_modules", "exclude_modules", "loraplus_lr_ratio",
                                "modules_to_save"};
  keys.insert(keys.end(), more.begin(), more.end());
  return keys;
}

void require_keys_of_method(const std::vector<std::string>& written, const std::string& method,
                            const std::string& origin) {
  for (const AdapterKey& key : adapter_keys()) {
    if (key.in_every_file || key.of(method) || !is_in(written, key.name)) continue;
    throw ConfigError(fmt::format("adapter.{}: belongs to method {}, {} holds {}. Leave it out of the run file.",
                                  key.name, fmt::join(key.methods, ", "), origin, method));
  }
}

AdapterConfig read_adapter_config(const Section& section) {
  AdapterConfig c;
  c.method = section.get_choice("method", c.method, method_names());
  c.r = section.get<int64_t>("r", c.r);
  c.lora_alpha = section.get<double>("lora_alpha", c.lora_alpha);
  c.lora_dropout = section.get<double>("lora_dropout", c.lora_dropout);
  c.use_rslora = section.get<bool>("use_rslora", c.use_rslora);
  c.target_modules = read_pattern(section, "target_modules");
  c.all_linear = c.target_modules.empty() || is_all_linear(c.target_modules);
  c.exclude_modules = read_pattern(section, "exclude_modules");
  c.rank_pattern = read_values(section, "rank_pattern");
  c.alpha_pattern = read_values(section, "alpha_pattern");
  c.init_lora_weights = section.get_choice("init_lora_weights", c.init_lora_weights, {"true", "gaussian"});
  for (const MethodEntry* method : methods()) method->read(section, c);
  c.loraplus_lr_ratio = section.get<double>("loraplus_lr_ratio", c.loraplus_lr_ratio);
  c.modules_to_save = section.get<std::vector<std::string>>("modules_to_save", {});
  c.path = section.get<std::string>("path", "");
  require_keys_of_method(section, c);
  check(c, [&](const std::string& key, const std::string& message) { section.fail(key, message); });
  return c;
}

}  // namespace corank
