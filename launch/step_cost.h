#pragma once
#include "launch/outline.h"
#include "trainer/methods/methods.h"

namespace corank {

/// What decides the work of a rank in one step, beside its Outline.
struct StepShape {
  int64_t micro_batches = 1;           ///< of this rank
  int64_t sequences = 1, seq_len = 1;  ///< of a micro-batch; every sequence is full
  int64_t targets = 0;                 ///< of a micro-batch
  int64_t element_bytes = 2;           ///< of an activation
  Checkpointing checkpointing = Checkpointing::none;

  int64_t tokens() const { return sequences * seq_len; }
};

/// Bytes of one rank, by what they are for. Those of the first four are there all the time.
struct MemoryPlan {
  int64_t base = 0;         ///< frozen weights in their stored format
  int64_t adapter = 0;      ///< float32 masters of what trains, and copies in the run's dtype where that is another
  int64_t gradients = 0;    ///< float32
  int64_t moments = 0;      ///< two, float32, and what the method keeps
  int64_t activations = 0;  ///< of one micro-batch, kept from forward for backward
  int64_t workspace = 0;    ///< what comes and goes at the fullest moment

  int64_t resident() const { return base + adapter + gradients + moments; }
  int64_t total() const { return resident() + activations + workspace; }
};

/// Arithmetic and memory traffic of one rank in one step.
struct StepWork {
  double product_flops = 0;   ///< of linears and head, forward and for their inputs' gradients
  double gradient_flops = 0;  ///< for the gradients of weights
  double attention_flops = 0;
  double bytes = 0;  ///< that kernels bound by memory read and write
};

/// Formulas for the kernels of a GPU, derived from what the layers save for backward (trainer/models, trainer/ops).
/// Pure functions.
MemoryPlan memory_of(const Outline& outline, const AdapterMethod& method, const StepShape& step);
StepWork work_of(const Outline& outline, const AdapterMethod& method, const StepShape& step);

}  // namespace corank
