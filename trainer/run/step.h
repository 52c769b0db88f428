#pragma once
#include <functional>

#include "comm/gradient_sum.h"
#include "data/loader.h"
#include "trainer/layers/model.h"
#include "trainer/methods/training.h"
#include "trainer/run/optimizer.h"

namespace corank {

/// What a step works on. Borrowed.
struct StepParts {
  const Mesh& mesh;
  const Model& model;
  MethodTraining& method;
  ParameterStore& store;
  Optimizer& optimizer;
  GradientSum& sum;
  DropoutKeys& dropout;  ///< of the run's seed
};

struct StepOptions {
  double learning_rate = 0;
  double max_grad_norm = 1.0;  ///< 0: no clipping
  /// Asked on every rank while the step is under way: whether the run is to stop after it. None: nobody asks.
  std::function<bool()> stop = {};
};

struct StepStats {
  double loss = 0;            ///< sum of token losses of the global batch / its target tokens
  double grad_norm = 0;       ///< before clipping
  int64_t target_tokens = 0;  ///< of the global batch
  int64_t tokens = 0;         ///< of the global batch
  bool stop = false;          ///< some rank's `stop` said so
};

/// Collective over the world. One optimizer step `step` (from 1) on one global batch; the same result for any split
/// into micro-batches and ranks, up to rounding. Everything that the host wants to know comes from the device in one
/// read, behind the update; the update itself is left out on the device where loss or gradient is not finite, so that
/// nothing changes. Throws InputError on every rank then, and where the step has no target.
StepStats train_step(const StepParts& parts, const StepBatches& batches, int64_t step, const StepOptions& options);

/// Means over the targets of an evaluation.
struct EvalResult {
  double loss = 0;
  double token_accuracy = 0;  ///< share of targets that the model, given all tokens before, finds the likeliest
  int64_t target_tokens = 0;
};
/// Collective over the world. Without gradients. Throws InputError on every rank, naming the first sample of data.eval
/// with a loss that is not finite, if there is one.
EvalResult evaluate(const Mesh& mesh, const Model& model, const std::vector<Batch>& batches);

}  // namespace corank
