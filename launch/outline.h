#pragma once
#include "launch/run_config.h"
#include "trainer/run/traffic.h"

namespace corank {

/// One rank's part of a run's model, and of what trains on it, under one split: sizes without numbers.
struct Outline {
  int tensor = 1, data = 1;  ///< ranks of a group
  TrafficShape shape;
  int64_t head_dim = 0;
  int64_t base_parameters = 0;  ///< of the whole model, as PEFT counts them
  int64_t trained = 0;          ///< parameters that train, of the whole model
  int64_t trained_here = 0;     ///< of this rank
  int64_t frozen_bytes = 0;     ///< of this rank, in their stored formats
  int64_t linear_bytes = 0;     ///< that the blocks' linears take, whole
  int64_t gathered_bytes = 0;   ///< of them on the device at a time where they are gathered from other ranks
};

/// From config.json and the headers of the model's files alone. `run.adapter` is merged with that of adapter.path.
/// `data`: ranks of a data-parallel group. ConfigError where the model cannot be split over `tensor` ranks.
Outline outline_of(const RunConfig& run, int tensor, int data);

/// The same run as full fine-tuning: every weight trains, so none is quantised.
RunConfig as_full_fine_tuning(RunConfig run);

}  // namespace corank
