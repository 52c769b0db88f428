#include "trainer/methods/rank_budget.h"

#include <algorithm>
#include <cmath>

namespace corank {

int64_t AdaLoraConfig::rank_of(const std::string& module) const {
  const auto found = kept_ranks.find(module);
  if (found == kept_ranks.end()) return init_r;
  return std::count(found->second.begin(), found->second.end(), true);
}

Masking masking_at(const AdaLoraConfig& c, int64_t step) {
  const int64_t last = c.total_step - c.tfinal;
  if (step > last) return Masking::keep;
  if (step == last) return Masking::choose;
  return step > c.tinit && step % c.deltaT == 0 ? Masking::choose : Masking::none;
}

int64_t budget_at(const AdaLoraConfig& c, int64_t modules, int64_t step) {
  const int64_t first = c.init_r * modules, target = c.target_r * modules, last = c.total_step - c.tfinal;
  if (step <= c.tinit) return first;
  if (step > last) return target;
  const double rest = 1 - static_cast<double>(step - c.tinit) / static_cast<double>(last - c.tinit);
  return static_cast<int64_t>(static_cast<double>(first - target) * std::pow(rest, 3) + static_cast<double>(target));
}

bool follows_importance(const AdaLoraConfig& c, int64_t step) { return step < c.total_step - c.tfinal; }

void update_importance(const at::Tensor& importance, const at::Tensor& uncertainty, const at::Tensor& parameter,
                       const at::Tensor& gradient, const AdaLoraConfig& c) {
  const at::Tensor sensitivity = (parameter * gradient).abs_();
  importance.mul_(c.beta1).add_(sensitivity * (1 - c.beta1));
  uncertainty.mul_(c.beta2).add_((sensitivity - importance).abs_().mul_(1 - c.beta2));
}

at::Tensor kept_triplets(const at::Tensor& scores, int64_t budget) {
  const at::Tensor flat = scores.flatten();
  const int64_t out = flat.numel() - budget;
  if (out <= 0) return at::ones_like(scores, scores.options().dtype(at::kBool));
  return scores > std::get<0>(flat.kthvalue(out));
}

}  // namespace corank
