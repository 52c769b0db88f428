#pragma once
#include <ATen/ATen.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

/// AdaLoRA's allocation of ranks (arXiv 2303.10512) as PEFT's RankAllocator does it (methods 7.3, 7.4). Steps count
/// from 1.
namespace corank {

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

enum class Masking {
  none,    ///< every rank stays
  choose,  ///< the worst triplets are masked anew
  keep,    ///< the last pattern is applied again
};

/// What happens after optimizer step `step`.
Masking masking_at(const AdaLoraConfig& config, int64_t step);
/// Ranks that may be alive after step `step`, over all modules.
int64_t budget_at(const AdaLoraConfig& config, int64_t modules, int64_t step);
/// True while the importance of elements is followed.
bool follows_importance(const AdaLoraConfig& config, int64_t step);

/// Moving averages of sensitivity |p g| and of its uncertainty, in place, all of one flat layout: p after the step, g
/// of it.
void update_importance(const at::Tensor& importance, const at::Tensor& uncertainty, const at::Tensor& parameter,
                       const at::Tensor& gradient, const AdaLoraConfig& config);

/// Which triplets live, bool, from their scores: those above the (all - budget)-th smallest.
at::Tensor kept_triplets(const at::Tensor& scores, int64_t budget);

}  // namespace corank
