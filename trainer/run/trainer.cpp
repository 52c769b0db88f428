#include "trainer/run/trainer.h"

#include <fmt/format.h>

#include <chrono>

#include "comm/agree.h"
#include "configs/error.h"
#include "trainer/ops/device.h"

namespace corank {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

Trainer::Trainer(StepParts parts, Loader& loader, const std::vector<Batch>& eval_batches, Checkpoints& checkpoints,
                 Ledger& ledger, std::vector<Observer*> observers, TrainerOptions options)
    : parts_(parts),
      loader_(loader),
      eval_batches_(eval_batches),
      checkpoints_(checkpoints),
      ledger_(ledger),
      observers_(std::move(observers)),
      options_(std::move(options)) {}

TrainingState Trainer::start(const StartRecord& record, const std::string& resume) {
  tell([&](Observer& observer) { observer.on_start(record); });
  ResumeRecord resumed;
  if (resume == "auto") {
    resumed.from = checkpoints_.newest().value_or("");
    resumed.passed_over = checkpoints_.passed_over();
  } else if (resume != "never") {
    resumed.from = resume;
  }
  const TrainingState state = resumed.from.empty() ? TrainingState() : checkpoints_.load(resumed.from);
  resumed.step = state.step;
  resumed.set_aside = checkpoints_.start_at(state.step);
  tell([&](Observer& observer) { observer.on_resume(resumed); });
  return state;
}

TrainingState Trainer::run(TrainingState state, const std::function<bool()>& stop,
                           const std::function<std::string()>& write_result) {
  const int64_t last = options_.schedule.total_steps;
  EndRecord end;
  end.first_step = state.step;
  end.max_steps = last;
  loader_.restore(state.loader);
  for (bool going = true; going && state.step < last;) going = advance(state, stop, end);
  end.step = state.step;
  end.all_ranks = sum_over_ranks(parts_.mesh.world(), end.bytes);
  if (state.step == last && write_result) end.result = write_result();
  tell([&](Observer& observer) { observer.on_end(end); });
  return state;
}

bool Trainer::advance(TrainingState& state, const std::function<bool()>& stop, EndRecord& end) {
  const int64_t step = state.step + 1, last = options_.schedule.total_steps;
  StepRecord record = take_step(step, stop);
  for (int p = 0; p < kNumPurposes; ++p) end.bytes[p] += record.bytes[p];
  end.tokens += record.local_tokens;
  end.targets += record.local_targets;
  state = {step, loader_.state()};
  if (due(step, options_.eval_steps)) {
    const EvaluationRecord evaluation = evaluate_after(step);
    record.eval_loss = evaluation.loss;
    record.eval_accuracy = evaluation.token_accuracy;
    tell([&](Observer& observer) { observer.on_evaluation(evaluation); });
  }
  record.logged = due(step, options_.logging_steps) || step == last || record.eval_loss;
  tell([&](Observer& observer) { observer.on_step(record); });
  if (due(step, options_.save_steps) || step == last || record.stops) save(state);
  return !record.stops;
}

StepRecord Trainer::take_step(int64_t step, const std::function<bool()>& stop) {
  const Ledger::Snapshot before = ledger_.snapshot();
  const auto start = std::chrono::steady_clock::now();
  const StepBatches batches = loader_.next();
  const double rate = lr_at(options_.schedule, step) * parts_.method.learning_rate_scale(step);
  const StepStats stats = train_step(parts_, batches, step, {rate, options_.max_grad_norm, stop});
  StepRecord record;
  record.stops = stats.stop;
  record.step = step;
  record.max_steps = options_.schedule.total_steps;
  record.epoch = batches.epoch;
  record.loss = stats.loss;
  record.grad_norm = stats.grad_norm;
  record.learning_rate = rate;
  record.target_tokens = stats.target_tokens;
  record.step_seconds = seconds_since(start);
  record.tokens_per_second = static_cast<double>(stats.tokens) / record.step_seconds;
  record.peak_memory_bytes = peak_memory_bytes(parts_.mesh.device());
  record.bytes = bytes_since(before);
  for (const Batch& batch : batches.micro_batches) {
    record.local_tokens += batch.num_tokens();
    record.local_targets += batch.num_targets();
  }
  return record;
}

EvaluationRecord Trainer::evaluate_after(int64_t step) const {
  try {
    const EvalResult result = evaluate(parts_.mesh, parts_.model, eval_batches_);
    return {step, result.loss, result.token_accuracy, result.target_tokens};
  } catch (const InputError& e) {
    throw InputError(
        fmt::format("evaluation after step {}: {} To train on without evaluation, set eval_steps: 0.", step, e.what()));
  }
}

void Trainer::save(const TrainingState& state) {
  const auto start = std::chrono::steady_clock::now();
  SaveRecord record{state.step, checkpoints_.save(state)};
  record.seconds = seconds_since(start);
  tell([&](Observer& observer) { observer.on_save(record); });
}

Ledger::Snapshot Trainer::bytes_since(const Ledger::Snapshot& before) const {
  Ledger::Snapshot bytes = ledger_.snapshot();
  for (int p = 0; p < kNumPurposes; ++p) bytes[p] = bytes[p] - before[p];
  return bytes;
}

void Trainer::tell(const std::function<void(Observer&)>& event) const {
  if (parts_.mesh.world().rank() != 0) return;
  for (Observer* observer : observers_) event(*observer);
}

}  // namespace corank
