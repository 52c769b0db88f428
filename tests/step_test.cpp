#include "trainer/run/step.h"

#include "configs/error.h"
#include "tests/support.h"

namespace corank::test {
namespace {

ModelOptions tiny() {
  ModelOptions options;
  options.shape = "tiny-llama";
  options.dtype = at::kFloat;
  return options;
}

Batch batch_with(int64_t target) {
  at::Tensor mask = at::zeros({6}, at::kByte);
  mask[target] = 1;
  return make_batch({{{at::arange(6, at::kInt), mask}}}, 0, 6);
}

StepBatches step_of(const Batch& batch) { return {{batch}, batch.num_targets(), batch.num_tokens(), 0}; }

// Momentum and decay would move the weights without a gradient too.
TEST(Step, WithoutATargetMovesNothing) {
  TrainingRun run(nullptr, 1, tiny(), AdapterConfig(), {{}, 0.1});
  run.step(step_of(batch_with(3)), 1, 1e-2);
  const at::Tensor masters = run.store.masters().clone(), moments = run.optimizer->exp_avg().clone();
  EXPECT_GT(moments.abs().max().item<double>(), 0);
  EXPECT_THROW(run.step(step_of(batch_with(0)), 2, 1e-2), InputError);  // a first token has nothing before it
  EXPECT_TRUE(at::equal(run.store.masters(), masters));
  EXPECT_TRUE(at::equal(run.optimizer->exp_avg(), moments));
  run.step(step_of(batch_with(3)), 2, 1e-2);
  EXPECT_FALSE(at::equal(run.store.masters(), masters));
}

}  // namespace
}  // namespace corank::test
