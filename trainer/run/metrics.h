#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "comm/ledger.h"

namespace corank {

/// One logged step, as it stands in metrics.jsonl.
struct StepRecord {
  int64_t step = 0, max_steps = 0;
  double epoch = 0;
  double loss = 0, grad_norm = 0, learning_rate = 0;
  int64_t target_tokens = 0;
  double tokens_per_second = 0;  ///< all tokens of the global batch, targets or not
  double step_seconds = 0;
  int64_t peak_memory_bytes = 0;
  Ledger::Snapshot bytes{};  ///< of this step, this rank
  std::optional<double> eval_loss, eval_accuracy;
};

/// Everything the trainer reports leaves through this. Called on rank 0 only; implementations do not communicate.
class Observer {
 public:
  virtual ~Observer() = default;
  virtual void on_step(const StepRecord& /*record*/) {}
  virtual void on_message(const std::string& /*text*/) {}
};

/// Appends one JSON object a logged step to `path`. Records of steps after `resume_step` are dropped first: a resumed
/// run writes them again.
std::unique_ptr<Observer> metrics_file(const std::string& path, int64_t resume_step);
/// The JSON object of one record.
std::string to_json(const StepRecord& record);

}  // namespace corank
