#pragma once
#include <string>
#include <vector>

#include "launch/machine.h"
#include "launch/outline.h"
#include "launch/step_cost.h"

namespace corank {

/// How a run is shared among ranks: what a search for the cheapest may choose.
struct Layout {
  int tensor = 1;
  int64_t micro_batch_size = 1;
  Checkpointing checkpointing = Checkpointing::none;
  std::string shard_base = "none";  ///< parallel.shard_base
};
Layout layout_of(const RunConfig& run);
RunConfig with_layout(RunConfig run, const Layout& layout);

/// What rank 0 sends for one purpose in a step.
struct PlannedTraffic {
  Purpose purpose = Purpose::adapter_gradients;
  int64_t payload = 0;                        ///< handed to collectives
  int64_t sent_inside = 0, sent_between = 0;  ///< by a ring, to ranks of the same host and of others
  double seconds = 0;                         ///< in the collectives, one after another
};

/// A run over a cluster before anything of it is there. Every sequence is full.
struct Plan {
  Layout layout;
  int ranks = 1, data = 1;
  int64_t all_parameters = 0, trained = 0;  ///< as PEFT counts them
  MemoryPlan memory;                        ///< a rank
  int64_t available = 0;                    ///< memory of a device
  std::vector<PlannedTraffic> traffic;      ///< a step, in the order of purposes
  double compute_seconds = 0;               ///< a step
  int64_t tokens = 0;                       ///< of a step, all ranks

  bool fits() const { return memory.total() <= available; }
  int64_t payload() const;
  /// That compute waits for: weights are gathered beside it, nothing else overlaps.
  double communication_seconds() const;
  double step_seconds() const { return compute_seconds + communication_seconds(); }
  double tokens_per_second() const { return static_cast<double>(tokens) / step_seconds(); }
};

/// Pure. `outline` is of the run's split; the cluster's ranks divide by it and by its ranks a host.
Plan make_plan(const RunConfig& run, const Outline& outline, const Cluster& cluster);

/// Of every split that divides ranks, model and batch, with the base resident and sharded, the quickest layout that
/// fits a device; quickest first.
std::vector<Plan> quickest_layouts(RunConfig run, const Cluster& cluster);

inline constexpr int kMostScaledRanks = 4096;

/// Tokens a second of the same layout and the same batch a rank, over more and more ranks.
struct ScalingPoint {
  std::string network;
  int ranks = 1;
  double run = 0, full = 0;  ///< tokens a second a rank: this run, and full fine-tuning
};
std::vector<ScalingPoint> scaling(const RunConfig& run, const Outline& outline, const Outline& full_outline,
                                  const Cluster& cluster);

}  // namespace corank
