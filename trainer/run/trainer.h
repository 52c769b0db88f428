#pragma once
#include <functional>
#include <string>
#include <vector>

#include "trainer/run/checkpoint.h"
#include "trainer/run/observer.h"
#include "trainer/run/schedule.h"
#include "trainer/run/step.h"

namespace corank {

struct TrainerOptions {
  Schedule schedule;  ///< total_steps is the run's number of steps
  double max_grad_norm = 1.0;
  int64_t logging_steps = 1;
  int64_t eval_steps = 0;  ///< 0: never
  int64_t save_steps = 0;  ///< 0: at the end only
};

/// Begins where a checkpoint ended, runs steps, decides when to log, evaluate and save, and tells the observers.
/// Borrows everything; the caller's declaration order is the order of destruction.
class Trainer {
 public:
  Trainer(StepParts parts, Loader& loader, const std::vector<Batch>& eval_batches, Checkpoints& checkpoints,
          Ledger& ledger, std::vector<Observer*> observers, TrainerOptions options);

  /// Collective over the world. Tells of `record`, then loads the checkpoint that `resume` asks for: the run's newest
  /// (auto), none (never), or that at the path. What lies ahead of its step is set aside. InputError, MissingError, or
  /// ConfigError where there are checkpoints of another run.
  TrainingState start(const StartRecord& record, const std::string& resume);
  /// Collective over the world. Trains from `state` to the last step. `stop` is asked in every step on every rank;
  /// if it is true on any, all save and return early. `write_result` is called once the run is complete, on every rank,
  /// and returns the place of what it wrote. Returns the state reached: complete when step == total_steps.
  TrainingState run(TrainingState state, const std::function<bool()>& stop,
                    const std::function<std::string()>& write_result = {});

 private:
  /// Collective over the world. One step, counted in `end`, and what is due after it; false: training is to stop.
  bool advance(TrainingState& state, const std::function<bool()>& stop, EndRecord& end);
  StepRecord take_step(int64_t step, const std::function<bool()>& stop);
  EvaluationRecord evaluate_after(int64_t step) const;
  void save(const TrainingState& state);
  Ledger::Snapshot bytes_since(const Ledger::Snapshot& before) const;
  /// The observers, on rank 0.
  void tell(const std::function<void(Observer&)>& event) const;
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
