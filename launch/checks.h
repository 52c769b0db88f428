#pragma once
#include <memory>

#include "comm/world.h"
#include "data/token_file.h"
#include "launch/run_config.h"

namespace corank {

/// The number of optimizer steps of the run, from max_steps or num_train_epochs.
int64_t total_steps(const RunConfig& run, const TokenFile& data);

struct CheckedInputs {
  AdapterConfig adapter;                        ///< merged with that of adapter.path
  int64_t train_samples = 0, eval_samples = 0;  ///< that are used: those with a target within data.seq_len
  int64_t base_parameters = 0, vocab_size = 0;
  std::vector<std::string> targets;  ///< modules the adapter sits on; empty for full fine-tuning
};

/// What a command checks before it starts, on one process for `ranks` ranks and without reading weights: what it uses
/// of the run, and nothing else. Each throws the error that the command would throw, and writes nothing. generate and
/// merge have no token files and no ranks to share them: they check what they load.
///
/// eval: the model and its split over parallel.tensor, the adapter, data.eval.
CheckedInputs check_evaluation(const RunConfig& run, int ranks);
/// plan: the model and its split, the adapter, the batch; no data.
CheckedInputs check_plan(const RunConfig& run, int ranks);
/// bench: the model and its split, the adapter, the batch, data.train where it is named.
CheckedInputs check_bench(const RunConfig& run, int ranks);
/// train on a host that writes nothing: all of these, data.eval, the number of steps and what depends on it.
CheckedInputs check_training_inputs(const RunConfig& run, int ranks);
/// train where rank 0 writes, validate: also output_dir, and what `resume` asks for.
CheckedInputs check_training(const RunConfig& run, int ranks);

using RunCheck = CheckedInputs (*)(const RunConfig& run, int ranks);
/// Collective over the world. `first` on rank 0, `elsewhere` on one rank of every other host, which may hold copies of
/// its own: a refusal is every rank's refusal, before anything is allocated.
void check_together(RunCheck first, RunCheck elsewhere, const RunConfig& run, const World& world);

/// ConfigError if output_dir holds another run than that of `identity`.
void check_output(const RunConfig& run, const RunIdentity& identity);
/// The first line of the run.yaml in output_dir.
std::string identity_line(const RunIdentity& identity);

}  // namespace corank
