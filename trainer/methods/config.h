#pragma once
#include <any>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <typeindex>
#include <utility>
#include <vector>

#include "trainer/methods/pattern.h"

namespace corank {

/// More than any linear has features worth a rank, and small enough that no size computed from it overflows.
constexpr int64_t kMaxRank = 16384;
constexpr double kMaxNumber = 1e30;  ///< float32 holds it, and products with learning rates

/// Which modules an adapter sits on, by PEFT's rules (methods 3.3): a list matches names that equal an entry or end
/// with
/// "." + entry; a pattern is a regular expression that must match the whole name; "all-linear" is every linear but the
/// head.
struct ModulePattern {
  std::vector<std::string> names;         ///< list form
  std::optional<NamePattern> expression;  ///< pattern form
  bool matches(const std::string& module) const;
  bool empty() const { return names.empty() && !expression; }
};

/// PEFT's rank_pattern and alpha_pattern, in file order: the first key that matches a module gives its value.
using ModuleValues = std::vector<std::pair<KeyPattern, double>>;

/// The entries of rank_pattern or alpha_pattern, which stand at `place`.
ModuleValues module_values(const std::vector<std::pair<std::string, double>>& entries, const PatternPlace& place);

/// What methods have beside the fields of all: a struct each, which the method's file alone looks at. A copy has its
/// own.
class MethodOptions {
 public:
  /// The struct's defaults where none was set.
  template <class T>
  const T& get() const {
    static const T defaults{};
    const auto found = structs_.find(typeid(T));
    return found == structs_.end() ? defaults : *std::any_cast<T>(&found->second);
  }
  template <class T>
  T& edit() {
    return *std::any_cast<T>(&structs_.try_emplace(typeid(T), T{}).first->second);
  }

 private:
  std::map<std::type_index, std::any> structs_;
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
  ModuleValues rank_pattern, alpha_pattern;
  std::string init_lora_weights = "true";    ///< true or gaussian
  double loraplus_lr_ratio = 1;              ///< LoRA+ (arXiv 2402.12354): learning rate of B over that of A
  std::vector<std::string> modules_to_save;  ///< embedding, head, last norm: trained in full beside the adapter
  bool fan_in_fan_out = false;               ///< of the model's files, for PEFT; no key of the run file
  std::string path;                          ///< PEFT folder or corank checkpoint to start from
  MethodOptions options;                     ///< of any methods: a file may bring another than `method`

  /// Rank and scaling of one module: patterns first, then r and lora_alpha; alpha / r, or alpha / sqrt(r) with rsLoRA.
  /// A method may have ranks of its own.
  int64_t rank_of(const std::string& module) const;
  double alpha_of(const std::string& module) const;
  double scaling_of(const std::string& module) const;
};

/// Refuses a value of a key. Throws.
using Fail = std::function<void(const std::string& key, const std::string& message)>;

/// Throws through `fail` what no method can use (r <= 0, dropout outside [0, 1)), and what those whose options it is
/// cannot.
void check(const AdapterConfig& config, const Fail& fail);
/// The same for options that go with some formats of the base (model.quantization) only.
void check_format(const AdapterConfig& config, const std::string& format, const Fail& fail);
/// Tells every method the number of the run's optimizer steps.
void set_total_steps(AdapterConfig& config, int64_t total_steps);
/// The method's steps against the run's: ConfigError where AdaLoRA has none left to choose ranks or ReMoRA never
/// merges.
void check_schedule(const AdapterConfig& config, int64_t total_steps);

}  // namespace corank
