#include "trainer/methods/config.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cctype>
#include <cmath>

#include "configs/writer.h"
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

std::string refusal_of_key(const AdapterKey& key, const std::string& method) {
  return fmt::format("belongs to method {}, this run's method is {}", fmt::join(key.methods, ", "), method);
}

/// A file named by adapter.path may bring another method than the run file's default: then merge_with_file asks.
void require_keys_of_method(const Section& section, const AdapterConfig& c) {
  if (!c.path.empty() && !section.has("method")) return;
  for (const AdapterKey& key : adapter_keys()) {
    if (section.has(key.name) && !key.shared && !key.of(c.method))
      section.fail(key.name, refusal_of_key(key, c.method));
  }
}

template <class T>
std::string plain(const T& value) {
  return fmt::format("{}", value);
}

std::string modules(const ModulePattern& p) {
  if (p.empty()) return "";
  return p.expression ? yaml::quoted(p.expression->text()) : yaml::list(p.names);
}

std::string values(const ModuleValues& entries) {
  std::vector<std::pair<std::string, double>> written;
  for (const auto& [key, value] : entries) written.emplace_back(key.text(), value);
  return yaml::map(written);
}

std::string of_remora(const AdapterConfig& c, const std::string& value) { return c.remora.steps > 0 ? value : ""; }

AdaLoraConfig read_adalora(const Section& section) {
  AdaLoraConfig c;
  c.init_r = section.get<int64_t>("init_r", c.init_r);
  c.target_r = section.get<int64_t>("target_r", c.target_r);
  c.tinit = section.get<int64_t>("tinit", c.tinit);
  c.tfinal = section.get<int64_t>("tfinal", c.tfinal);
  c.deltaT = section.get<int64_t>("deltaT", c.deltaT);
  c.beta1 = section.get<double>("beta1", c.beta1);
  c.beta2 = section.get<double>("beta2", c.beta2);
  c.orth_reg_weight = section.get<double>("orth_reg_weight", c.orth_reg_weight);
  return c;
}

constexpr int64_t kMaxIterations = 1000;
constexpr double kMaxNumber = 1e30;  // float32 holds it, and products with learning rates

using Fail = std::function<void(const std::string& key, const std::string& message)>;

/// Throws through `fail` unless `good`.
struct Require {
  const Fail& fail;
  template <class T>
  void operator()(bool good, const std::string& key, T value, const char* wanted) const {
    if (!good) fail(key, fmt::format("{} is not {}", value, wanted));
  }
};

bool is_rank(double r) { return r >= 1 && r <= kMaxRank && r == std::floor(r); }
bool is_scale(double value) { return value > 0 && value <= kMaxNumber; }
const std::string kRank = fmt::format("a rank in [1, {}]", kMaxRank);
const std::string kScale = fmt::format("above 0 and at most {}", kMaxNumber);

void check_adalora(const AdaLoraConfig& c, const Require& require) {
  require(is_rank(static_cast<double>(c.init_r)), "init_r", c.init_r, kRank.c_str());
  require(c.target_r >= 0 && c.target_r <= c.init_r, "target_r", c.target_r, "in [0, init_r]");
  require(c.tinit >= 0, "tinit", c.tinit, "a number of steps");
  require(c.tfinal >= 0, "tfinal", c.tfinal, "a number of steps");
  require(c.deltaT > 0, "deltaT", c.deltaT, "a positive number of steps");
  require(c.beta1 > 0 && c.beta1 < 1, "beta1", c.beta1, "in (0, 1)");
  require(c.beta2 > 0 && c.beta2 < 1, "beta2", c.beta2, "in (0, 1)");
  require(c.orth_reg_weight >= 0 && c.orth_reg_weight <= kMaxNumber, "orth_reg_weight", c.orth_reg_weight,
          "a weight of at least 0");
}

constexpr int64_t kMoraTypes[] = {1, 2, 3, 4, 6};

void check_mora(int64_t type, const RemoraConfig& c, const Require& require) {
  for (const int64_t one : c.types) {
    require(one >= 1 && one <= 4, "remora_types", one, "one of 1, 2, 3, 4, which have groups to change");
  }
  require(std::count(std::begin(kMoraTypes), std::end(kMoraTypes), type) > 0, "mora_type", type,
          "one of 1, 2, 3, 4, 6");
  require(c.steps >= 0, "remora_steps", c.steps, "a number of steps");
  if (c.steps == 0) return;
  require(c.warmup_steps >= 0 && c.warmup_steps < c.steps, "remora_warmup_steps", c.warmup_steps,
          "a number of steps below remora_steps; set remora_warmup_steps beside it");
}

/// Types are kept only where restarts go through them.
RemoraConfig read_remora(const Section& section) {
  RemoraConfig c;
  c.steps = section.get<int64_t>("remora_steps", 0);
  c.types = section.get<std::vector<int64_t>>("remora_types", {1, 2});
  c.warmup_steps = section.get<int64_t>("remora_warmup_steps", c.warmup_steps);
  if (c.types.empty()) section.fail("remora_types", "the list is empty");
  for (const char* key : {"remora_types", "remora_warmup_steps"}) {
    if (c.steps == 0 && section.has(key)) section.fail(key, "says how to restart; remora_steps must say when");
  }
  if (c.steps != 0 && section.has("mora_type")) {
    section.fail("mora_type", "contradicts remora_steps: the types are those of remora_types; leave it out");
  }
  if (c.steps == 0) c.types.clear();
  return c;
}

/// PEFT would adapt the head and the embedding too, and refuse norms; here only the blocks' linears take an adapter.
void require_only_linears(const AdapterConfig& config) {
  if (config.all_linear) return;
  for (const char* other :
       {"lm_head", "model.embed_tokens", "model.norm", "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm", "model.layers.0.self_attn.q_norm", "model.layers.0.self_attn.k_norm",
        "transformer.wte", "transformer.wpe", "transformer.ln_f", "transformer.h.0.ln_1", "transformer.h.0.ln_2"}) {
    if (!config.target_modules.matches(other) || config.exclude_modules.matches(other)) continue;
    if (ModulePattern{config.modules_to_save, {}}.matches(other)) continue;  // PEFT: trained in full, so not adapted
    throw ConfigError(
        fmt::format("adapter.target_modules: matches {}, which cannot take an adapter. Name linears of the blocks "
                    "only (q_proj ... down_proj; GPT-2: c_attn, c_proj, c_fc).",
                    other));
  }
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

bool is_all_linear(const ModulePattern& targets) {
  std::string text = targets.expression ? targets.expression->text() : "";
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
  return text == "all-linear";
}

ModuleValues module_values(const std::vector<std::pair<std::string, double>>& entries, const PatternPlace& place) {
  if (entries.size() > kMaxPatternKeys)
    place.fail(fmt::format("{} keys are more than {}", entries.size(), kMaxPatternKeys));
  ModuleValues values;
  for (const auto& [key, value] : entries) values.emplace_back(KeyPattern(key, place), value);
  return values;
}

bool AdapterKey::of(const std::string& method) const {
  return methods.empty() || std::count(methods.begin(), methods.end(), method) > 0;
}

const std::vector<AdapterKey>& adapter_keys() {
  using C = const AdapterConfig&;
  const std::vector<std::string> lora{"lora", "dora", "pissa"}, adalora{"adalora"};
  const std::vector<std::string> adapters{"lora", "dora", "pissa", "adalora", "mora"};
  static const std::vector<AdapterKey> keys{
      {"method", {}, false, [](C c) { return c.method; }},
      {"r", {"lora", "dora", "pissa", "mora"}, true, [](C c) { return plain(c.r); }},
      {"lora_alpha", {"lora", "dora", "pissa", "adalora"}, true, [](C c) { return plain(c.lora_alpha); }},
      {"lora_dropout", adapters, true, [](C c) { return plain(c.lora_dropout); }},
      {"target_modules", adapters, true,
       [](C c) { return c.all_linear ? std::string("all-linear") : modules(c.target_modules); }},
      {"exclude_modules", adapters, true, [](C c) { return modules(c.exclude_modules); }},
      {"use_rslora", lora, false, [](C c) { return plain(c.use_rslora); }},
      {"rank_pattern", {"lora", "dora", "pissa", "mora"}, false, [](C c) { return values(c.rank_pattern); }},
      {"alpha_pattern", lora, false, [](C c) { return values(c.alpha_pattern); }},
      {"init_lora_weights", {"lora", "dora"}, false, [](C c) { return yaml::quoted(c.init_lora_weights); }},
      {"loraplus_lr_ratio", adapters, false, [](C c) { return plain(c.loraplus_lr_ratio); }},
      {"modules_to_save", adapters, false,
       [](C c) { return c.modules_to_save.empty() ? std::string() : yaml::list(c.modules_to_save); }},
      {"mora_type", {"mora"}, false, [](C c) { return c.remora.steps ? std::string() : plain(c.mora_type); }},
      {"remora_steps", {"mora"}, false, [](C c) { return of_remora(c, plain(c.remora.steps)); }},
      {"remora_types", {"mora"}, false, [](C c) { return of_remora(c, plain(c.remora.types)); }},
      {"remora_warmup_steps", {"mora"}, false, [](C c) { return of_remora(c, plain(c.remora.warmup_steps)); }},
      {"pissa_niter", {"pissa"}, false, [](C c) { return c.pissa_niter ? plain(*c.pissa_niter) : std::string(); }},
      {"pissa_iterations", {"pissa"}, false, [](C c) { return plain(c.pissa_iterations); }},
      {"init_r", adalora, false, [](C c) { return plain(c.adalora.init_r); }},
      {"target_r", adalora, false, [](C c) { return plain(c.adalora.target_r); }},
      {"tinit", adalora, false, [](C c) { return plain(c.adalora.tinit); }},
      {"tfinal", adalora, false, [](C c) { return plain(c.adalora.tfinal); }},
      {"deltaT", adalora, false, [](C c) { return plain(c.adalora.deltaT); }},
      {"beta1", adalora, false, [](C c) { return plain(c.adalora.beta1); }},
      {"beta2", adalora, false, [](C c) { return plain(c.adalora.beta2); }},
      {"orth_reg_weight", adalora, false, [](C c) { return plain(c.adalora.orth_reg_weight); }},
      {"path", {}, false, [](C c) { return c.path.empty() ? std::string() : yaml::quoted(c.path); }},
  };
  return keys;
}

void require_keys_of_method(const std::vector<std::string>& written, const std::string& method,
                            const std::string& origin) {
  for (const AdapterKey& key : adapter_keys()) {
    if (key.shared || key.of(method) || !std::count(written.begin(), written.end(), key.name)) continue;
    throw ConfigError(fmt::format("adapter.{}: belongs to method {}, {} holds {}. Leave it out of the run file.",
                                  key.name, fmt::join(key.methods, ", "), origin, method));
  }
}

bool ModulePattern::matches(const std::string& module) const {
  if (expression) return expression->matches(module);
  return std::any_of(names.begin(), names.end(),
                     [&](const std::string& name) { return module == name || module.ends_with("." + name); });
}

int64_t AdapterConfig::rank_of(const std::string& module) const {
  if (method == "adalora") return adalora.rank_of(module);
  return static_cast<int64_t>(first_match(rank_pattern, module).value_or(static_cast<double>(r)));
}

double AdapterConfig::alpha_of(const std::string& module) const {
  return first_match(alpha_pattern, module).value_or(lora_alpha);
}

double AdapterConfig::scaling_of(const std::string& module) const {
  const auto rank = static_cast<double>(rank_of(module));
  return alpha_of(module) / (use_rslora ? std::sqrt(rank) : rank);
}

int64_t AdaLoraConfig::rank_of(const std::string& module) const {
  const auto found = kept_ranks.find(module);
  if (found == kept_ranks.end()) return init_r;
  return std::count(found->second.begin(), found->second.end(), true);
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
  c.adalora = read_adalora(section);
  c.mora_type = section.get<int64_t>("mora_type", c.mora_type);
  c.remora = read_remora(section);
  if (!c.remora.types.empty()) c.mora_type = c.remora.types.front();
  c.pissa_niter = section.get_optional<int64_t>("pissa_niter");
  c.pissa_iterations = section.get<int64_t>("pissa_iterations", c.pissa_iterations);
  c.loraplus_lr_ratio = section.get<double>("loraplus_lr_ratio", c.loraplus_lr_ratio);
  c.modules_to_save = section.get<std::vector<std::string>>("modules_to_save", {});
  c.path = section.get<std::string>("path", "");
  require_keys_of_method(section, c);
  check(c, [&](const std::string& key, const std::string& message) { section.fail(key, message); });
  return c;
}

void check(const AdapterConfig& c, const Fail& fail) {
  const Require require{fail};
  require(is_rank(static_cast<double>(c.r)), "r", c.r, kRank.c_str());
  require(is_scale(c.lora_alpha), "lora_alpha", c.lora_alpha, kScale.c_str());
  require(c.lora_dropout >= 0 && c.lora_dropout < 1, "lora_dropout", c.lora_dropout, "in [0, 1)");
  require(!c.pissa_niter || *c.pissa_niter >= 0, "pissa_niter", c.pissa_niter.value_or(0), "a number of iterations");
  require(c.pissa_iterations >= 1 && c.pissa_iterations <= kMaxIterations, "pissa_iterations", c.pissa_iterations,
          "a number of rounds in [1, 1000]");
  require(is_scale(c.loraplus_lr_ratio), "loraplus_lr_ratio", c.loraplus_lr_ratio, kScale.c_str());
  for (const auto& [key, rank] : c.rank_pattern) {
    if (!is_rank(rank)) fail("rank_pattern", fmt::format("{}: {} is not {}", key.text(), rank, kRank));
  }
  for (const auto& [key, alpha] : c.alpha_pattern) {
    if (!is_scale(alpha)) fail("alpha_pattern", fmt::format("{}: {} is not {}", key.text(), alpha, kScale));
  }
  check_mora(c.mora_type, c.remora, require);
  if (c.method == "adalora") check_adalora(c.adalora, require);
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

void check_schedule(const AdapterConfig& config) {
  const AdaLoraConfig& c = config.adalora;
  if (config.remora.steps > c.total_step) {
    throw ConfigError(fmt::format(
        "adapter.remora_steps: {} is more than the run's {} steps, so nothing would be merged. Lower it, train longer, "
        "or leave it out.",
        config.remora.steps, c.total_step));
  }
  if (config.method != "adalora" || c.tinit < c.total_step - c.tfinal) return;
  throw ConfigError(fmt::format(
      "adapter.tinit: {} steps at the start and adapter.tfinal: {} at the end leave none of the run's {} for choosing "
      "ranks. Lower them or train longer.",
      c.tinit, c.tfinal, c.total_step));
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
