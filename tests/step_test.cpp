#include "trainer/run/step.h"

#include <limits>

#include "configs/error.h"
#include "tests/support.h"
#include "trainer/methods/mora.h"
#include "trainer/methods/rank_budget.h"
#include "trainer/ops/random.h"

namespace corank::test {
namespace {

ModelOptions tiny_step_model() {
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
  TrainingRun run(nullptr, 1, tiny_step_model(), AdapterConfig(), {{}, 0.1});
  run.step(step_of(batch_with(3)), 1, 1e-2);
  const at::Tensor masters = run.store.masters().clone(), moments = run.optimizer->exp_avg().clone();
  EXPECT_GT(moments.abs().max().item<double>(), 0);
  EXPECT_THROW(run.step(step_of(batch_with(0)), 2, 1e-2), InputError);  // a first token has nothing before it
  EXPECT_TRUE(at::equal(run.store.masters(), masters));
  EXPECT_TRUE(at::equal(run.optimizer->exp_avg(), moments));
  run.step(step_of(batch_with(3)), 2, 1e-2);
  EXPECT_FALSE(at::equal(run.store.masters(), masters));
}

/// Everything that a step may change, as copies.
std::vector<at::Tensor> state_of(TrainingRun& run) {
  std::vector<at::Tensor> all{run.store.masters().clone(), run.optimizer->exp_avg().clone(),
                              run.optimizer->exp_avg_sq().clone()};
  for (const auto& entry : run.method->state()) all.push_back(entry.second.clone());
  for (const AdaptedLinear* linear : run.model->linears()) all.push_back(linear->weight().dense_OI().clone());
  return all;
}

size_t num_changed(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  size_t changed = 0;
  for (size_t i = 0; i < a.size(); ++i) changed += at::equal(a[i], b[i]) ? 0 : 1;
  return changed;
}

TEST(Step, ThatIsNotFiniteMovesNothingOfAnyMethod) {
  for (const std::string& method : method_names()) {
    AdapterConfig adapter;
    adapter.method = method;
    if (method == "adalora") {
      adapter.options.edit<AdaLoraConfig>() = {
          .init_r = 6, .target_r = 3, .tinit = 1, .tfinal = 1, .deltaT = 1, .total_step = 6, .kept_ranks = {}};
    }
    if (method == "mora") {
      adapter.options.edit<MoraConfig>() = {.steps = 3, .types = {1, 2}, .warmup_steps = 1};
    }
    TrainingRun run(nullptr, 1, tiny_step_model(), adapter, {{}, 0.1});
    for (const int64_t step : {1, 2}) run.step(step_of(batch_with(3)), step, 1e-2);
    const std::vector<at::Tensor> before = state_of(run);
    const NamedWeight norm = run.model->other_weights().back();
    const at::Tensor good = norm.weight->value.clone();
    norm.weight->value.fill_(std::numeric_limits<double>::quiet_NaN());
    EXPECT_THROW(run.step(step_of(batch_with(3)), 3, 1e-2), InputError) << method;
    norm.weight->value.copy_(good);
    EXPECT_EQ(num_changed(state_of(run), before), 0U) << method;
    run.step(step_of(batch_with(3)), 3, 1e-2);
    EXPECT_GE(num_changed(state_of(run), before), 3U) << method;
  }
}

TEST(Step, GradientsAreClippedToTheNormAndNotBelow) {
  std::vector<at::Tensor> moments;
  for (const double most : {0.0, 1e6, 1e-3}) {
    TrainingRun run(nullptr, 1, tiny_step_model(), AdapterConfig());
    const double norm = run.step(step_of(batch_with(3)), 1, 0, most).grad_norm;
    moments.push_back(run.optimizer->exp_avg() * (most == 1e-3 ? (norm + 1e-6) / most : 1));
  }
  EXPECT_TRUE(at::equal(moments[0], moments[1])) << "a norm below the limit keeps the bits";
  EXPECT_LT(relative_error(moments[2], moments[0]), 1e-6);
}

TEST(Step, SaysThatItShallStopOnlyWhereAskedTo) {
  TrainingRun run(nullptr, 1, tiny_step_model(), AdapterConfig());
  const auto stops = [&](const std::function<bool()>& stop) {
    return train_step(run.parts(), step_of(batch_with(3)), 1, {1e-2, 1.0, stop}).stop;
  };
  EXPECT_TRUE(stops([] { return true; }));
  EXPECT_FALSE(stops([] { return false; }));
  EXPECT_FALSE(stops({}));
}

TEST(DropoutKeys, AreThoseOfTheStepAtTheSameAddress) {
  DropoutKeys keys(42, at::kCPU), later(42, at::kCPU);
  const auto value = [](const at::Tensor& key) { return static_cast<uint64_t>(key.item<int64_t>()); };
  keys.begin(1);
  EXPECT_EQ(value(keys.key("dropout", "a")), ops::key_of(42, "dropout", "a", 1));
  EXPECT_EQ(value(keys.key("base dropout", "a")), ops::key_of(42, "base dropout", "a", 1));
  keys.begin(2);
  const at::Tensor kept = keys.key("dropout", "a");
  EXPECT_EQ(value(kept), ops::key_of(42, "dropout", "a", 2));
  keys.begin(3);
  EXPECT_EQ(value(kept), ops::key_of(42, "dropout", "a", 3)) << "written where it was";
  EXPECT_EQ(value(keys.key("dropout", "new")), ops::key_of(42, "dropout", "new", 3));
  keys.begin(4);
  later.begin(4);
  for (const char* place : {"a", "new"}) {
    EXPECT_EQ(value(keys.key("dropout", place)), value(later.key("dropout", place)));
  }
}

/// As experts need it: a linear that sees some of the tokens gives what it gives them among all, dropout's mask
/// included.
TEST(Linear, SeesSomeOfTheRows) {
  AdapterConfig adapter;
  adapter.lora_dropout = 0.5;
  TrainingRun run(nullptr, 1, tiny_step_model(), adapter);
  run.step(step_of(batch_with(3)), 1, 1e-2);  // B is no longer zero
  const at::AutoGradMode no_grad(false);
  const Batch batch = batch_with(3);
  SegmentAttention attention(batch);
  const ForwardContext context{batch, attention, run.mesh.tp(), &run.dropout};
  const AdaptedLinear* linear = run.model->linears().front();
  const at::Tensor x_NI = at::linspace(-1, 1, 6 * linear->site().in).view({6, -1});
  const at::Tensor rows = at::tensor({4, 1}, at::kLong), some_NI = x_NI.index_select(0, rows);
  const at::Tensor all_NO = column_forward({linear}, x_NI, context)[0];
  const auto error = [&](const at::Tensor& of) {
    return relative_error(column_forward({linear}, some_NI, context, of)[0], all_NO.index_select(0, rows));
  };
  EXPECT_LT(error(rows), 1e-6);
  EXPECT_GT(error(at::tensor({1, 4}, at::kLong)), 1e-6) << "other tokens have other masks";
  EXPECT_THROW(error({}), c10::Error) << "as many slots as rows";
}

}  // namespace
}  // namespace corank::test
