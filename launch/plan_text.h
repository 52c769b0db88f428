#pragma once
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "launch/plan.h"

namespace corank {

/// All that `corank plan` answers.
struct PlanReport {
  std::string run_file, method, model;
  Cluster cluster;
  int64_t global_batch_size = 1;
  std::string quantization;
  Plan run, full;  ///< the run, and full fine-tuning in the same layout
  std::vector<Plan> layouts, full_layouts;
};

/// For people; without the last newline.
std::string plan_text(const PlanReport& report);
/// For programs: the same, under names that are part of the interface (README, "Before anything is started").
nlohmann::ordered_json plan_json(const PlanReport& report);
nlohmann::ordered_json scaling_json(const std::vector<ScalingPoint>& points);
/// "12.34 GiB".
std::string gib(int64_t bytes);

}  // namespace corank
