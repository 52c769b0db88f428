#pragma once
#include <functional>
#include <string>
#include <vector>

#include "trainer/run/checkpoint.h"
#include "trainer/run/metrics.h"
#include "trainer/run/schedule.h"
#include "trainer/run/step.h"

namespace corank {

struct TrainerOptions {
  Schedule schedule;  ///< total_steps is the run's number of steps
  double max_grad_norm = 1.0;
  uint64_t seed = 42;
  int64_t logging_steps = 1;
  int64_t eval_steps = 0;  ///< 0: never
  int64_t save_steps = 0;  ///< 0: at the end only
};

/// Runs steps, decides when to log, evaluate and save. Borrows everything; the caller's declaration order is the order
/// of destruction.
class Trainer {
 public:
  Trainer(StepParts parts, Loader& loader, const std::vector<Batch>& eval_batches, Checkpoints& checkpoints,
          Ledger& ledger, std::vector<Observer*> observers, TrainerOptions options);

  /// Collective over the world. Trains from `state` to the last step. `stop` is asked in every step on every rank;
  /// if it is true on any, all save and return early. Returns the state reached: complete when step == total_steps.
  TrainingState run(TrainingState state, const std::function<bool()>& stop);

 private:
  StepRecord take_step(int64_t step, const std::function<bool()>& stop, bool& stopping);
  void evaluate_into(StepRecord& record) const;
  void report(const StepRecord& record);
  bool due(int64_t step, int64_t every) const { return every > 0 && step % every == 0; }

  StepParts parts_;
  Loader& loader_;
  const std::vector<Batch>& eval_batches_;
  Checkpoints& checkpoints_;
  Ledger& ledger_;
  std::vector<Observer*> observers_;
  TrainerOptions options_;
};

}  // namespace corank
