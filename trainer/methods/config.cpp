#include "trainer/methods/config.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "trainer/methods/methods.h"

namespace corank {
namespace {

constexpr size_t kMaxPatternKeys = 1000;  // of rank_pattern or alpha_pattern: more than any model has linears

/// The first match in file order.
std::optional<double> first_match(const ModuleValues& values, const std::string& module) {
  for (const auto& [key, value] : values) {
    if (key.matches(module, values.size())) return value;
  }
  return std::nullopt;
}

}  // namespace

ModuleValues module_values(const std::vector<std::pair<std::string, double>>& entries, const PatternPlace& place) {
  if (entries.size() > kMaxPatternKeys)
    place.fail(fmt::format("{} keys are more than {}", entries.size(), kMaxPatternKeys));
  ModuleValues values;
  for (const auto& [key, value] : entries) values.emplace_back(KeyPattern(key, place), value);
  return values;
}

bool ModulePattern::matches(const std::string& module) const {
  if (expression) return expression->matches(module);
  return std::any_of(names.begin(), names.end(),
                     [&](const std::string& name) { return module == name || module.ends_with("." + name); });
}

int64_t MethodEntry::rank_of(const AdapterConfig& config, const std::string& module) const {
  return static_cast<int64_t>(first_match(config.rank_pattern, module).value_or(static_cast<double>(config.r)));
}

int64_t AdapterConfig::rank_of(const std::string& module) const { return method_entry(method).rank_of(*this, module); }

double AdapterConfig::alpha_of(const std::string& module) const {
  return first_match(alpha_pattern, module).value_or(lora_alpha);
}

double AdapterConfig::scaling_of(const std::string& module) const {
  const auto rank = static_cast<double>(rank_of(module));
  return alpha_of(module) / (use_rslora ? std::sqrt(rank) : rank);
}

void check(const AdapterConfig& c, const Fail& fail) {
  const Require require{fail};
  require.rank("r", c.r);
  require.scale("lora_alpha", c.lora_alpha);
  require(c.lora_dropout >= 0 && c.lora_dropout < 1, "lora_dropout", c.lora_dropout, "in [0, 1)");
  require.scale("loraplus_lr_ratio", c.loraplus_lr_ratio);
  for (const auto& [key, rank] : c.rank_pattern) Require{fail, key.text() + ": "}.rank("rank_pattern", rank);
  for (const auto& [key, alpha] : c.alpha_pattern) Require{fail, key.text() + ": "}.scale("alpha_pattern", alpha);
  for (const MethodEntry* method : methods()) method->check(c, require);
}

void check_format(const AdapterConfig& config, const std::string& format, const Fail& fail) {
  for (const MethodEntry* method : methods()) method->check_format(config, format, fail);
}

void set_total_steps(AdapterConfig& config, int64_t total_steps) {
  for (const MethodEntry* method : methods()) method->set_total_steps(config, total_steps);
}

void check_schedule(const AdapterConfig& config, int64_t total_steps) {
  method_entry(config.method).check_schedule(config, total_steps);
}

}  // namespace corank
