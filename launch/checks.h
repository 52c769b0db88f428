#pragma once
#include <memory>

#include "comm/world.h"
#include "data/token_file.h"
#include "launch/run_config.h"

namespace corank {

/// The number of optimizer steps of the run, from max_steps or num_train_epochs.
int64_t total_steps(const RunConfig& run, const TokenFile& data);

struct CheckedInputs {
  AdapterConfig adapter;  ///< merged with that of adapter.path
  int64_t train_samples = 0, eval_samples = 0;
  int64_t base_parameters = 0;
  std::vector<std::string> targets;  ///< modules the adapter sits on; empty for full fine-tuning
};

/// What every command on a run checks, on one process and without reading weights: the architecture and its split over
/// parallel.tensor, names and shapes of all tensors, targets, the adapter at adapter.path, every token of the token
/// files, the batch for `ranks` ranks.
CheckedInputs check_inputs(const RunConfig& run, int ranks);
/// Every check that `train` makes before its first step: check_inputs, the keys that only training needs, output_dir
/// and the checkpoint that `resume` asks for. Throws the error that train would throw, and writes nothing.
CheckedInputs check_training(const RunConfig& run, int ranks);
/// Collective over the world. `check` on rank 0 for all: a refusal is every rank's refusal, before anything is
/// allocated.
void check_together(CheckedInputs (*check)(const RunConfig& run, int ranks), const RunConfig& run, const World& world);

/// ConfigError if output_dir holds another run than that of `identity`.
void check_output(const RunConfig& run, const RunIdentity& identity);
/// The first line of the run.yaml in output_dir.
std::string identity_line(const RunIdentity& identity);

}  // namespace corank
