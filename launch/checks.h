#pragma once
#include <memory>

#include "comm/world.h"
#include "data/token_file.h"
#include "launch/run_config.h"

namespace corank {

/// The number of optimizer steps of the run, from max_steps or num_train_epochs.
int64_t total_steps(const RunConfig& run, const TokenFile& data);

struct CheckedInputs {
  int64_t train_samples = 0, eval_samples = 0;
  int64_t base_parameters = 0;
  std::vector<std::string> targets;  ///< modules the adapter sits on; empty for full fine-tuning
};

/// Every check that `train` makes before its first step, on one process and without reading weights: the architecture
/// and its split over parallel.tensor, names and shapes of all tensors, targets, adapter.path, every token of the token
/// files, the batch for `ranks` ranks. Throws the error that train would throw.
CheckedInputs check_inputs(const RunConfig& run, int ranks);
/// Collective over the world. The same on rank 0 for all: a refusal is every rank's refusal, before anything is
/// allocated.
void check_inputs_together(const RunConfig& run, const World& world);

}  // namespace corank
