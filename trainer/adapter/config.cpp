#include "trainer/adapter/config.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <regex>

#include "trainer/adapter/methods.h"

namespace corank {
namespace {

/// True if `expression` matches the whole of `text`; `where` and the expression stand in the error.
bool full_match(const std::string& expression, const std::string& text) {
  try {
    return std::regex_match(text, std::regex(expression));
  } catch (const std::regex_error& e) {
    throw ConfigError(fmt::format("'{}' is not a regular expression: {}", expression, e.what()));
  }
}

/// PEFT's rule for rank_pattern and alpha_pattern: (.*\.)?(KEY)$ from the start of the name, first match in file order.
std::optional<double> first_match(const std::vector<std::pair<std::string, double>>& patterns,
                                  const std::string& module) {
  for (const auto& [key, value] : patterns) {
    if (full_match("(.*\\.)?(" + key + ")", module)) return value;
  }
  return std::nullopt;
}

bool is_all_linear(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
  return text == "all-linear";
}

/// PEFT would adapt the head and the embedding too, and refuse norms; here only the blocks' linears take an adapter.
void require_only_linears(const AdapterConfig& config) {
  if (config.all_linear) return;
  for (const char* other :
       {"lm_head", "model.embed_tokens", "model.norm", "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm", "model.layers.0.self_attn.q_norm", "model.layers.0.self_attn.k_norm",
        "transformer.wte", "transformer.wpe", "transformer.ln_f", "transformer.h.0.ln_1", "transformer.h.0.ln_2"}) {
    if (!config.target_modules.matches(other) || config.exclude_modules.matches(other)) continue;
    throw ConfigError(
        fmt::format("adapter.target_modules: matches {}, which cannot take an adapter. Name linears of the blocks "
                    "only (q_proj ... down_proj; GPT-2: c_attn, c_proj, c_fc).",
                    other));
  }
}

std::vector<std::pair<std::string, double>> read_values(const Section& section, const std::string& key) {
  if (section.has(key)) return section.get_ordered(key);
  section.get_optional<std::string>(key);  // absent, but a key we know
  return {};
}

ModulePattern read_pattern(const Section& section, const std::string& key) {
  ModulePattern pattern;
  if (!section.has(key)) {
    section.get_optional<std::string>(key);
  } else if (section.is_list(key)) {
    pattern.names = section.get<std::vector<std::string>>(key);
    if (pattern.names.empty()) section.fail(key, "the list is empty");
  } else {
    pattern.expression = section.get<std::string>(key);
  }
  return pattern;
}

}  // namespace

bool ModulePattern::matches(const std::string& module) const {
  if (!expression.empty()) return full_match(expression, module);
  return std::any_of(names.begin(), names.end(),
                     [&](const std::string& name) { return module == name || module.ends_with("." + name); });
}

int64_t AdapterConfig::rank_of(const std::string& module) const {
  return static_cast<int64_t>(first_match(rank_pattern, module).value_or(static_cast<double>(r)));
}

double AdapterConfig::alpha_of(const std::string& module) const {
  return first_match(alpha_pattern, module).value_or(lora_alpha);
}

double AdapterConfig::scaling_of(const std::string& module) const {
  const auto rank = static_cast<double>(rank_of(module));
  return alpha_of(module) / (use_rslora ? std::sqrt(rank) : rank);
}

AdapterConfig read_adapter_config(const Section& section) {
  AdapterConfig c;
  c.method = section.get_choice("method", c.method, method_names());
  c.r = section.get<int64_t>("r", c.r);
  c.lora_alpha = section.get<double>("lora_alpha", c.lora_alpha);
  c.lora_dropout = section.get<double>("lora_dropout", c.lora_dropout);
  c.use_rslora = section.get<bool>("use_rslora", c.use_rslora);
  c.target_modules = read_pattern(section, "target_modules");
  c.all_linear = c.target_modules.empty() || is_all_linear(c.target_modules.expression);
  c.exclude_modules = read_pattern(section, "exclude_modules");
  c.rank_pattern = read_values(section, "rank_pattern");
  c.alpha_pattern = read_values(section, "alpha_pattern");
  c.init_lora_weights = section.get_choice("init_lora_weights", c.init_lora_weights, {"true", "gaussian"});
  c.path = section.get<std::string>("path", "");
  check(c, section.where());
  return c;
}

void check(const AdapterConfig& c, const std::string& where) {
  const auto fail = [&](const std::string& what) { throw ConfigError(where + what); };
  if (c.r <= 0) fail(fmt::format(".r: {} is not a positive rank", c.r));
  if (!(c.lora_alpha > 0)) fail(fmt::format(".lora_alpha: {} is not positive", c.lora_alpha));
  if (!(c.lora_dropout >= 0 && c.lora_dropout < 1))
    fail(fmt::format(".lora_dropout: {} is not in [0, 1)", c.lora_dropout));
  for (const auto& [key, rank] : c.rank_pattern) {
    if (rank < 1 || rank != std::floor(rank))
      fail(fmt::format(".rank_pattern.{}: {} is not a positive rank", key, rank));
  }
  for (const auto& [key, alpha] : c.alpha_pattern) {
    if (!(alpha > 0)) fail(fmt::format(".alpha_pattern.{}: {} is not positive", key, alpha));
  }
}

std::vector<std::string> select_targets(const AdapterConfig& config, const std::vector<std::string>& linears) {
  require_only_linears(config);
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
  throw ConfigError(
      fmt::format("adapter.target_modules: nothing matches [{}{}]{}. The model's linears are named {} (e.g. {}).",
                  fmt::join(config.target_modules.names, ", "), config.target_modules.expression,
                  config.exclude_modules.empty() ? "" : " after exclude_modules", fmt::join(kinds, ", "),
                  linears.empty() ? "none" : linears.front()));
}

}  // namespace corank
