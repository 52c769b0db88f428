#include "trainer/run/trainer.h"

#include <fmt/format.h>

#include <chrono>

#include "configs/error.h"
#include "trainer/ops/device.h"

namespace corank {

Trainer::Trainer(StepParts parts, Loader& loader, const std::vector<Batch>& eval_batches, Checkpoints& checkpoints,
                 Ledger& ledger, std::vector<Observer*> observers, TrainerOptions options)
    : parts_(parts),
      loader_(loader),
      eval_batches_(eval_batches),
      checkpoints_(checkpoints),
      ledger_(ledger),
      observers_(std::move(observers)),
      options_(std::move(options)) {}

TrainingState Trainer::run(TrainingState state, const std::function<bool()>& stop) {
  const int64_t last = options_.schedule.total_steps;
  loader_.restore(state.loader);
  while (state.step < last) {
    const int64_t step = state.step + 1;
    bool stopping = false;
    StepRecord record = take_step(step, stop, stopping);
    state = {step, loader_.state()};
    if (due(step, options_.eval_steps)) evaluate_into(record);
    if (due(step, options_.logging_steps) || step == last || record.eval_loss) report(record);
    if (due(step, options_.save_steps) || step == last || stopping) checkpoints_.save(state);
    if (stopping) break;
  }
  return state;
}

StepRecord Trainer::take_step(int64_t step, const std::function<bool()>& stop, bool& stopping) {
  const Ledger::Snapshot before = ledger_.snapshot();
  const auto start = std::chrono::steady_clock::now();
  const StepBatches batches = loader_.next();
  const double rate = lr_at(options_.schedule, step) * parts_.method.learning_rate_scale(step);
  const StepStats stats = train_step(parts_, batches, step, {rate, options_.max_grad_norm, options_.seed, stop});
  stopping = stats.stop;
  StepRecord record;
  record.step = step;
  record.max_steps = options_.schedule.total_steps;
  record.epoch = batches.epoch;
  record.loss = stats.loss;
  record.grad_norm = stats.grad_norm;
  record.learning_rate = rate;
  record.target_tokens = stats.target_tokens;
  record.step_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  record.tokens_per_second = static_cast<double>(stats.tokens) / record.step_seconds;
  record.peak_memory_bytes = peak_memory_bytes(parts_.mesh.device());
  for (int p = 0; p < kNumPurposes; ++p) record.bytes[p] = ledger_.snapshot()[p] - before[p];
  return record;
}

void Trainer::evaluate_into(StepRecord& record) const {
  try {
    const EvalResult eval = evaluate(parts_.mesh, parts_.model, eval_batches_);
    record.eval_loss = eval.loss;
    record.eval_accuracy = eval.token_accuracy;
  } catch (const InputError& e) {
    throw InputError(fmt::format("evaluation after step {}: {} To train on without evaluation, set eval_steps: 0.",
                                 record.step, e.what()));
  }
}

void Trainer::report(const StepRecord& record) {
  if (parts_.mesh.world().rank() != 0) return;
  for (Observer* observer : observers_) observer->on_step(record);
}

}  // namespace corank
