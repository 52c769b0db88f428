#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "configs/reader.h"
#include "trainer/methods/pattern.h"

namespace corank {

/// More than any linear has features worth a rank, and small enough that no size computed from it overflows.
constexpr int64_t kMaxRank = 16384;

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

/// "all-linear" in any case of letters.
bool is_all_linear(const ModulePattern& targets);

/// The entries of rank_pattern or alpha_pattern, which stand at `place`.
ModuleValues module_values(const std::vector<std::pair<std::string, double>>& entries, const PatternPlace& place);

/// AdaLoRA's own keys, under PEFT's names. Steps are optimizer steps.
struct AdaLoraConfig {
  int64_t init_r = 12, target_r = 8;  ///< ranks a module starts with, and has on average at the end
  int64_t tinit = 0, tfinal = 0;      ///< steps before the first and after the last masking
  int64_t deltaT = 1;                 ///< steps from one masking to the next
  double beta1 = 0.85, beta2 = 0.85;  ///< of the averages of importance and its uncertainty
  double orth_reg_weight = 0.5;
  int64_t total_step = 0;  ///< of the run
  /// PEFT's rank_pattern of a finished run: which of a module's init_r ranks the file holds. Empty: all.
  std::map<std::string, std::vector<bool>> kept_ranks;

  int64_t rank_of(const std::string& module) const;
};

/// ReMoRA (arXiv 2405.12130): every `steps` optimizer steps MoRA's matrix is added to the frozen weight and starts
/// again at zero, under the next type.
struct RemoraConfig {
  int64_t steps = 0;           ///< from one restart to the next; 0: none
  std::vector<int64_t> types;  ///< mora_type of each span, from the first again after the last; empty: no ReMoRA
  int64_t warmup_steps = 50;   ///< of the learning rate, after each restart
  int64_t merges = 0;          ///< restarts that a file holds
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
  std::string init_lora_weights = "true";  ///< true or gaussian
  AdaLoraConfig adalora;
  int64_t mora_type = 1;  ///< ReMoRA: of the first span
  RemoraConfig remora;
  std::optional<int64_t> pissa_niter;        ///< subspace iterations of a randomised decomposition; none: exact
  int64_t pissa_iterations = 1;              ///< rounds of decomposing what quantising the residual leaves (QPiSSA)
  double loraplus_lr_ratio = 1;              ///< LoRA+ (arXiv 2402.12354): learning rate of B over that of A
  std::vector<std::string> modules_to_save;  ///< embedding, head, last norm: trained in full beside the adapter
  bool fan_in_fan_out = false;               ///< of the model's files, for PEFT; no key of the run file
  std::string path;                          ///< PEFT folder or corank checkpoint to start from

  /// Rank and scaling of one module: patterns first, then r and lora_alpha; alpha / r, or alpha / sqrt(r) with rsLoRA.
  int64_t rank_of(const std::string& module) const;
  double alpha_of(const std::string& module) const;
  double scaling_of(const std::string& module) const;
};

/// One key of the `adapter` section.
struct AdapterKey {
  std::string name;
  std::vector<std::string> methods;  ///< that have it; empty: all. Beside another method it is refused, not ignored,
  bool shared = false;  ///< unless it is one that a LoRA run file has anyway: one override then changes its method
  std::string (*yaml)(const AdapterConfig&);  ///< its value as the resolved run shows it; empty: left out

  bool of(const std::string& method) const;
};
const std::vector<AdapterKey>& adapter_keys();
/// ConfigError if a key of `written` does not belong to `method`, which `origin` holds.
void require_keys_of_method(const std::vector<std::string>& written, const std::string& method,
                            const std::string& origin);

/// Reads the `adapter` section. ConfigError for values that PEFT would refuse too.
AdapterConfig read_adapter_config(const Section& section);
/// Calls `fail` with key and message for values no method can use (r <= 0, dropout outside [0, 1)). `fail` throws.
void check(const AdapterConfig& config,
           const std::function<void(const std::string& key, const std::string& message)>& fail);

/// ConfigError for an entry of exclude_modules, rank_pattern or alpha_pattern that concerns none of the linears that
/// the targets match: a typing error that would silently train something else.
void require_every_entry(const AdapterConfig& config, const std::vector<std::string>& linears);

/// The method's steps against the run's: ConfigError where AdaLoRA has none left to choose ranks or ReMoRA never
/// merges.
void check_schedule(const AdapterConfig& config);

/// The modules of `linears` that the config adapts, in order. ConfigError, with the nearest names, if there is none.
std::vector<std::string> select_targets(const AdapterConfig& config, const std::vector<std::string>& linears);

}  // namespace corank
