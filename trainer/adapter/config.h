#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "configs/reader.h"

namespace corank {

/// Which modules an adapter sits on, by PEFT's rules (methods 3.3): a list matches names that equal an entry or end
/// with
/// "." + entry; a pattern is a regular expression that must match the whole name; "all-linear" is every linear but the
/// head.
struct ModulePattern {
  std::vector<std::string> names;  ///< list form
  std::string expression;          ///< pattern form, when not empty
  bool matches(const std::string& module) const;
  bool empty() const { return names.empty() && expression.empty(); }
};

/// The adapter section of a run, under PEFT's names.
struct AdapterConfig {
  std::string method = "lora";
  int64_t r = 8;
  double lora_alpha = 16;
  double lora_dropout = 0;
  bool use_rslora = false;
  bool all_linear = true;  ///< target_modules: all-linear
  ModulePattern target_modules;
  ModulePattern exclude_modules;
  std::vector<std::pair<std::string, double>> rank_pattern, alpha_pattern;  ///< in file order: the first match wins
  std::string init_lora_weights = "true";                                   ///< true or gaussian
  bool fan_in_fan_out = false;  ///< of the model's files, for PEFT; no key of the run file
  std::string path;             ///< PEFT folder or corank checkpoint to start from

  /// Rank and scaling of one module: patterns first, then r and lora_alpha; alpha / r, or alpha / sqrt(r) with rsLoRA.
  int64_t rank_of(const std::string& module) const;
  double alpha_of(const std::string& module) const;
  double scaling_of(const std::string& module) const;
};

/// Reads the `adapter` section. ConfigError for values that PEFT would refuse too.
AdapterConfig read_adapter_config(const Section& section);
/// Throws ConfigError for values no method can use (r <= 0, dropout outside [0, 1), a broken expression).
void check(const AdapterConfig& config, const std::string& where);

/// The modules of `linears` that the config adapts, in order. ConfigError, with the nearest names, if there is none.
std::vector<std::string> select_targets(const AdapterConfig& config, const std::vector<std::string>& linears);

}  // namespace corank
