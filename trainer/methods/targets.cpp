#include "trainer/methods/targets.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>

#include "configs/error.h"

namespace corank {

bool is_all_linear(const ModulePattern& targets) {
  std::string text = targets.expression ? targets.expression->text() : "";
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
  return text == "all-linear";
}

void require_only_linears(const AdapterConfig& config, const std::vector<std::string>& others) {
  if (config.all_linear) return;
  for (const std::string& other : others) {
    if (!config.target_modules.matches(other) || config.exclude_modules.matches(other)) continue;
    if (ModulePattern{config.modules_to_save, {}}.matches(other)) continue;  // PEFT: trained in full, so not adapted
    throw ConfigError(
        fmt::format("adapter.target_modules: matches {}, which cannot take an adapter. Name linears of the blocks "
                    "only (q_proj ... down_proj; GPT-2: c_attn, c_proj, c_fc).",
                    other));
  }
}

void require_every_entry(const AdapterConfig& config, const std::vector<std::string>& linears) {
  const auto require = [&](const char* key, const std::string& entry, const auto& concerns) {
    if (std::any_of(linears.begin(), linears.end(), concerns)) return;
    throw ConfigError(
        fmt::format("adapter.{}: '{}' matches none of the adapted modules. Correct or remove it.", key, entry));
  };
  const auto targeted = [&](const std::string& name) {
    return config.all_linear || config.target_modules.matches(name);
  };
  for (const std::string& entry : config.exclude_modules.names) {
    const ModulePattern one{{entry}, {}};
    require("exclude_modules", entry, [&](const std::string& name) { return targeted(name) && one.matches(name); });
  }
  if (const auto& entry = config.exclude_modules.expression) {
    require("exclude_modules", entry->text(),
            [&](const std::string& name) { return targeted(name) && entry->matches(name); });
  }
  const auto adapted = [&](const std::string& name) { return targeted(name) && !config.exclude_modules.matches(name); };
  const auto require_keys = [&](const char* key, const ModuleValues& values) {
    for (const auto& entry : values) {
      require(key, entry.first.text(),
              [&](const std::string& name) { return adapted(name) && entry.first.matches(name, values.size()); });
    }
  };
  require_keys("rank_pattern", config.rank_pattern);
  require_keys("alpha_pattern", config.alpha_pattern);
}

std::vector<std::string> select_targets(const AdapterConfig& config, const std::vector<std::string>& linears) {
  std::vector<std::string> matched;
  for (const std::string& name : linears) {
    if (!config.exclude_modules.empty() && config.exclude_modules.matches(name)) continue;
    if (config.all_linear || config.target_modules.matches(name)) matched.push_back(name);
  }
  if (!matched.empty()) return matched;
  std::vector<std::string> kinds;
  for (const std::string& name : linears) {
    const std::string kind = name.substr(name.rfind('.') + 1);
    if (std::find(kinds.begin(), kinds.end(), kind) == kinds.end()) kinds.push_back(kind);
  }
  const ModulePattern& targets = config.target_modules;
  const std::string wanted =
      targets.expression
          ? fmt::format("the regular expression '{0}' (a name is a list of one: [{0}])", targets.expression->text())
          : fmt::format("[{}]", fmt::join(targets.names, ", "));
  throw ConfigError(
      fmt::format("adapter.target_modules: nothing matches {}{}. The model's linears are named {} (e.g. {}).", wanted,
                  config.exclude_modules.empty() ? "" : " after exclude_modules", fmt::join(kinds, ", "),
                  linears.empty() ? "none" : linears.front()));
}

}  // namespace corank
