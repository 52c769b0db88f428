#pragma once
#include <memory>
#include <vector>

#include "launch/session.h"
#include "trainer/run/step.h"

namespace corank {

/// A training step outside a run: optimizer, sum of gradients and batches over a Session, for the bench commands.
class Bench {
 public:
  /// Batches come from data.train, or, where none is named, are random: every sequence seq_len tokens, all targets.
  explicit Bench(Session& session);

  /// Collective over the world. The batches of the next step.
  StepBatches next();
  StepStats step(const StepBatches& batches, int64_t number);

 private:
  Session& session_;
  Optimizer optimizer_;
  std::unique_ptr<GradientSum> sum_;
  DropoutKeys dropout_;
  std::unique_ptr<TokenFile> data_;
  std::unique_ptr<Loader> loader_;
};

}  // namespace corank
