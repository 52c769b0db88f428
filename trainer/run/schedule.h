#pragma once
#include <cstdint>
#include <string>

namespace corank {

/// Learning-rate schedule with Hugging Face's formulas (transformers.optimization,
/// get_{constant_with_warmup,linear,cosine}_schedule).
struct Schedule {
  std::string type = "cosine";  ///< constant, linear, cosine
  double learning_rate = 2e-4;
  int64_t warmup_steps = 0;
  int64_t total_steps = 1;
};

/// The rate that step `step` uses, from 1. The first warm-up step uses 0.
double lr_at(const Schedule& schedule, int64_t step);

}  // namespace corank
