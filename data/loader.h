#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "data/batch.h"
#include "data/sampler.h"

namespace corank {

struct LoaderOptions {
  SamplerOptions sampler;
  int64_t global_batch_size = 8;  ///< sequences a step, whatever the number of ranks
  int64_t micro_batch_size = 1;   ///< sequences a micro-batch; micro-batch k of a step holds [k m, (k+1) m)
  int dp_rank = 0;                ///< micro-batch k belongs to rank k mod dp_size
  int dp_size = 1;
  bool uneven = false;  ///< micro-batches that do not divide by dp_size are allowed: some ranks pad
};

/// Where the next batch starts. Independent of the number of ranks.
struct LoaderState {
  int64_t epoch = 0;
  int64_t sequence = 0;  ///< first sequence of the next batch within the epoch
  bool operator==(const LoaderState&) const = default;
};

/// This rank's micro-batches of one step, and the size of the global batch.
struct StepBatches {
  std::vector<Batch> micro_batches;  ///< as many on every rank: what holds the step's sequences
  int64_t num_targets = 0;           ///< of all ranks
  int64_t num_tokens = 0;            ///< of all ranks, padding not counted
  double epoch = 0;                  ///< epochs done after this step, e.g. 1.25
};

/// Endless stream of steps, prepared by a background thread one step ahead. The last batch of an epoch holds what is
/// left; where some ranks get a micro-batch and others none, theirs is one padding token without targets, so that all
/// ranks make the same calls.
/// Not thread-safe.
class Loader {
 public:
  /// ConfigError if global_batch_size does not divide by micro_batch_size * dp_size (`uneven`: by micro_batch_size).
  /// `file` is borrowed.
  Loader(const TokenFile& file, LoaderOptions options);
  ~Loader();

  /// The next step's micro-batches, on the CPU (pinned where CUDA is up). Throws what went wrong in the background; the
  /// state is then as before.
  StepBatches next();
  /// State after the batches handed out so far: a loader restored to it continues with the very next batch.
  LoaderState state() const;
  /// InputError, here or from next(), for a state that the file does not have.
  void restore(const LoaderState& state);
  /// Optimizer steps in one epoch (equal in all epochs only without packing).
  int64_t steps_in_epoch(int64_t epoch) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// One pass in file order over `file` (evaluation): every sample with a target once, micro-batch k to rank k mod
/// dp_size, as many micro-batches on every rank (padding ones as in Loader), no shuffling. slots_N counts from the
/// file's first sequence. global_batch_size does not matter.
std::vector<Batch> evaluation_batches(const TokenFile& file, const LoaderOptions& options);

/// A micro-batch from samples that stand in given sequences of the global batch; the loader's inner step, also for
/// tests. sequences[i] = the samples of sequence first_sequence + i. No sequence gives the padding micro-batch.
/// InternalError if the samples of a sequence take more than seq_len tokens.
Batch make_batch(const std::vector<std::vector<Sample>>& sequences, int64_t first_sequence, int64_t seq_len);

}  // namespace corank
