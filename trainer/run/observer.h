#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "comm/ledger.h"

namespace corank {

/// What trains, and on what.
struct StartRecord {
  int64_t trainable_parameters = 0, all_parameters = 0;  ///< of the whole model, as PEFT counts them
  int ranks = 1, data_parallel = 1, tensor_parallel = 1, ranks_on_host = 1;
  int threads = 1;    ///< a rank
  std::string hosts;  ///< hosts, versions and settings of what communicates
  int64_t global_batch_size = 1, micro_batch_size = 1;
  std::string backend, dtype, device;
  int64_t base_bytes = 0, training_bytes = 0;  ///< memory a rank: all weights; masters, gradients and moments
  int64_t gradient_bytes = 0;                  ///< that each rank hands over in a step
  std::vector<std::string> remarks;            ///< on the data, a line each
};

/// Where training begins.
struct ResumeRecord {
  int64_t step = 0;                      ///< the last one done
  std::string from;                      ///< the checkpoint; empty: none, step is 0
  std::vector<std::string> passed_over;  ///< newer checkpoints that are damaged, with the reason
  std::vector<std::string> set_aside;    ///< what lay ahead of `step`, a line each
};

/// One step, as it stands in metrics.jsonl.
struct StepRecord {
  int64_t step = 0, max_steps = 0;
  bool logged = true;  ///< logging_steps, an evaluation or the end asks for it
  double epoch = 0;
  double loss = 0, grad_norm = 0, learning_rate = 0;
  int64_t target_tokens = 0;
  double tokens_per_second = 0;  ///< all tokens of the global batch, targets or not
  double step_seconds = 0;
  int64_t peak_memory_bytes = 0;
  Ledger::Snapshot bytes{};                     ///< of this step, this rank
  int64_t local_tokens = 0, local_targets = 0;  ///< of this rank's micro-batches
  bool stops = false;                           ///< some rank wants to stop after it
  std::optional<double> eval_loss, eval_accuracy;
};

/// An evaluation after step `step`.
struct EvaluationRecord {
  int64_t step = 0;
  double loss = 0, token_accuracy = 0;
  int64_t target_tokens = 0;
};

/// A checkpoint that is whole, and was read back.
struct SaveRecord {
  int64_t step = 0;
  std::string folder;
  double seconds = 0;
};

/// How far training came. Complete when step == max_steps.
struct EndRecord {
  int64_t first_step = 0;  ///< after which this start began
  int64_t step = 0, max_steps = 0;
  int64_t tokens = 0, targets = 0;  ///< of this rank's micro-batches in these steps
  Ledger::Snapshot bytes{};         ///< of these steps, this rank; evaluations and saves are none
  Ledger::Snapshot all_ranks{};     ///< the same of all ranks together, without times
  std::string result;               ///< where the adapter or model of a complete run was written
};

/// Everything the trainer reports leaves through this: on_start, on_resume, then in each step on_evaluation (where
/// there is one), on_step and on_save (where there is one), then on_end. A run that throws ends without on_end. Called
/// on rank 0 only; implementations do not communicate.
class Observer {
 public:
  virtual ~Observer() = default;
  virtual void on_start(const StartRecord& /*record*/) {}
  virtual void on_resume(const ResumeRecord& /*record*/) {}
  virtual void on_step(const StepRecord& /*record*/) {}
  virtual void on_evaluation(const EvaluationRecord& /*record*/) {}
  virtual void on_save(const SaveRecord& /*record*/) {}
  virtual void on_end(const EndRecord& /*record*/) {}
};

}  // namespace corank
