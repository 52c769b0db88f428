#include "trainer/run/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace corank {

double lr_at(const Schedule& s, int64_t step) {
  const auto done = static_cast<double>(step - 1), warmup = static_cast<double>(s.warmup_steps);
  if (done < warmup) return s.learning_rate * done / std::max(1.0, warmup);
  if (s.type == "constant") return s.learning_rate;
  const double rest = std::max(1.0, static_cast<double>(s.total_steps) - warmup);
  const double progress = (done - warmup) / rest;
  if (s.type == "linear") return s.learning_rate * std::max(0.0, 1 - progress);
  return s.learning_rate * std::max(0.0, 0.5 * (1 + std::cos(std::numbers::pi * progress)));
}

}  // namespace corank
