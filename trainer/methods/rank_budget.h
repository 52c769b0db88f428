#pragma once
#include <ATen/ATen.h>

#include <cstdint>

#include "trainer/methods/config.h"

/// AdaLoRA's allocation of ranks (arXiv 2303.10512) as PEFT's RankAllocator does it (methods 7.3, 7.4). Steps count
/// from 1.
namespace corank {

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
