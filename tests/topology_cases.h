#pragma once
#include <functional>
#include <map>
#include <optional>

#include "data/storage.h"
#include "tests/mpi_main.h"
#include "tests/support.h"
#include "trainer/methods/mora.h"
#include "trainer/methods/rank_budget.h"
#include "trainer/run/checkpoint.h"
#include "trainer/run/trainer.h"

// Suites over settings of a run, for every layout: the same losses, the same bits where tensors are replicated, the
// same bytes as predicted.
namespace corank::test {
namespace {

constexpr int64_t kSteps = 6;

struct Setting {
  std::string name, method = "lora", shape = "tiny-llama";
  int64_t mora_type = 1;
  int64_t remora_steps = 0;
  std::vector<std::string> modules_to_save = {};
  double dropout = 0;
  bool packing = true;
  Checkpointing checkpointing = Checkpointing::none;
  at::ScalarType dtype = at::kFloat;
  std::string quantization = "none";
  std::string shard_base = "none";

  /// Losses of two layouts: float32 rounding, or that of bfloat16 partial sums.
  double bound() const { return dtype == at::kFloat ? 1e-5 : 5e-3; }
};

std::ostream& operator<<(std::ostream& out, const Setting& setting) { return out << setting.name; }

ModelOptions tiny(const Setting& setting) {
  ModelOptions options;
  options.shape = setting.shape;
  options.dtype = setting.dtype;
  options.quantization = setting.quantization;
  options.max_positions = 64;
  options.checkpointing = setting.checkpointing;
  return options;
}

/// With its base where the setting leaves it.
ModelOptions placed(const Setting& setting, const World* world, int tensor) {
  ModelOptions options = tiny(setting);
  options.residency = make_residency(setting.shard_base, shared_mesh(world, tensor).mesh.dp());
  return options;
}

AdapterConfig adapter(const Setting& setting) {
  AdapterConfig config;
  config.method = setting.method;
  config.lora_dropout = setting.dropout;
  MoraConfig& mora = config.options.edit<MoraConfig>();
  mora.type = setting.mora_type;
  if (setting.remora_steps > 0) {
    mora.steps = setting.remora_steps;
    mora.types = {1, 2};
    mora.warmup_steps = setting.remora_steps / 2;
  }
  config.modules_to_save = setting.modules_to_save;
  config.options.edit<AdaLoraConfig>() = {
      .init_r = 6, .target_r = 3, .tinit = 1, .tfinal = 2, .deltaT = 1, .total_step = 6, .kept_ranks = {}};
  return config;
}

/// Two micro-batches of two sequences for each rank of the job, however they are arranged.
LoaderOptions loader(const Setting& setting, const Mesh& mesh) {
  return {{64, setting.packing, true, 7}, 4 * test_world().size(), 2, mesh.dp().rank(), mesh.dp().size()};
}

double rate(const Setting& setting) { return setting.method == "full" ? 1e-3 : 1e-2; }

/// What the trainer reports: rank 0's.
struct Records : Observer {
  void on_step(const StepRecord& record) override { steps.push_back(record); }
  std::vector<StepRecord> steps;
};

/// A run with what `corank train` puts around it, trained by the same Trainer.
struct Job {
  Job(const World* world, int tensor, const Setting& setting, const TokenFile& data, const std::string& folder)
      : run(world, tensor, placed(setting, world, tensor), adapter(setting)),
        batches(data, loader(setting, run.mesh)),
        checkpoints(disk, folder, {"same run", adapter(setting), "tiny"}, {}, run.mesh, run.store, *run.optimizer,
                    *run.method),
        options{.schedule = {"constant", rate(setting), 0, kSteps}} {}

  /// Collective. The newest checkpoint, or that at `path`, is loaded; step 0 where there is none.
  TrainingState start(std::optional<std::string> path = std::nullopt) {
    if (!path) path = checkpoints.newest();
    const TrainingState state = path ? checkpoints.load(*path) : TrainingState();
    checkpoints.start_at(state.step);
    return state;
  }

  /// Collective. Trains from `start` to the last step, or until `stop`, asked in every step on every rank.
  TrainingState train(const TrainingState& start, const std::function<bool(int64_t step)>& stop) {
    Trainer trainer(run.parts(), batches, no_evaluation, checkpoints, run.ledger, {&records}, options);
    int64_t step = start.step;
    return trainer.run(start, [&] { return stop(++step); });
  }

  /// Collective over tp. All parameters, in full.
  at::Tensor parameters() const {
    std::vector<at::Tensor> flat;
    for (const auto& entry : run.store.gather(run.store.masters(), run.mesh.tp()))
      flat.push_back(entry.second.flatten());
    return at::cat(flat);
  }

  TrainingRun run;
  Loader batches;
  const std::vector<Batch> no_evaluation;
  DiskStorage disk;
  Checkpoints checkpoints;
  TrainerOptions options;
  Records records;
};

/// Trains to the end.
bool never(int64_t /*step*/) { return false; }

/// The steps of a run on this process alone.
std::vector<StepRecord> alone(const Setting& setting, const TokenFile& data) {
  const TemporaryFolder folder;
  Job job(nullptr, 1, setting, data, folder.path());
  job.train(job.start(), never);
  return job.records.steps;
}

/// The bytes of every step of this rank, the question of the trainer included.
std::vector<Ledger::Snapshot> predicted_bytes(const Setting& setting, const TrainingRun& run, const TokenFile& data) {
  Loader batches(data, loader(setting, run.mesh));
  std::vector<Ledger::Snapshot> steps;
  for (int64_t step = 1; step <= kSteps; ++step) {
    steps.push_back(predicted_bytes(run, tiny(setting), adapter(setting), batches.next(), step));
  }
  return steps;
}

/// What steps are not predicted to send is left out: a run agrees on its start and saves, and these tests compare
/// replicas while steps are under way.
Ledger::Snapshot of_steps(Ledger::Snapshot counted) {
  for (const Purpose beside : {Purpose::startup, Purpose::checkpoint}) counted[static_cast<size_t>(beside)] = {};
  return counted;
}

Ledger::Snapshot sum(const std::vector<Ledger::Snapshot>& steps) {
  Ledger::Snapshot all;
  for (const Ledger::Snapshot& step : steps) {
    for (int p = 0; p < kNumPurposes; ++p) all[p] += step[p];
  }
  return all;
}

void expect_same_steps(const std::vector<StepRecord>& steps, const std::vector<StepRecord>& expected, double bound) {
  ASSERT_EQ(steps.size(), expected.size());
  for (size_t i = 0; i < steps.size(); ++i) {
    SCOPED_TRACE("step " + std::to_string(i + 1));
    EXPECT_EQ(steps[i].step, expected[i].step);
    EXPECT_NEAR(steps[i].loss / expected[i].loss, 1, bound);
    EXPECT_NEAR(steps[i].grad_norm / expected[i].grad_norm, 1, 100 * bound);
    EXPECT_EQ(steps[i].target_tokens, expected[i].target_tokens);
  }
}

/// Both where there are two ranks: dp x tp.
int mixed() { return test_world().size() % 2 == 0 ? 2 : 1; }

class Topology : public testing::TestWithParam<Setting> {
 protected:
  TokenFile data_{repository("configs/tiny/train.h5")};
};

TEST_P(Topology, SameLossesEqualReplicasAndPredictedBytesInEveryLayout) {
  const Setting setting = GetParam();
  const bool first = test_world().rank() == 0;  // which is told of the steps
  const std::vector<StepRecord> expected = first ? alone(setting, data_) : std::vector<StepRecord>();
  for (const int tensor : tensor_sizes()) {
    SCOPED_TRACE("tp " + std::to_string(tensor));
    const SharedFolder folder(test_world());
    Job job(&test_world(), tensor, setting, data_, folder.path());
    const Ledger& ledger = job.run.ledger;
    const auto predicted = predicted_bytes(setting, job.run, data_);
    const TrainingState start = job.start();
    const Ledger::Snapshot before = ledger.snapshot();
    job.train(start, [&](int64_t step) {
      EXPECT_EQ(unequal_replicas(job.run.mesh, job.run.store), std::vector<std::string>{}) << "after step " << step;
      return false;
    });
    expect_same_steps(job.records.steps, expected, setting.bound());
    for (const StepRecord& record : job.records.steps) {
      expect_bytes(of_steps(record.bytes), predicted[record.step - 1], "as reported");
    }
    expect_bytes(of_steps(difference(ledger.snapshot(), before)), sum(predicted), "of the whole run");
  }
}

TEST_P(Topology, TwoRunsAreEqualToTheBit) {
  std::vector<at::Tensor> ends;
  for (int attempt = 0; attempt < 2; ++attempt) {
    const SharedFolder folder(test_world());
    Job job(&test_world(), mixed(), GetParam(), data_, folder.path());
    job.train(job.start(), [](int64_t step) { return step == 3; });
    ends.push_back(job.run.store.masters().clone());
  }
  EXPECT_TRUE(at::equal(ends[0], ends[1]));
}

class Resume : public testing::TestWithParam<Setting> {
 protected:
  Job job(int tensor, const SharedFolder& folder) {
    return Job(&test_world(), tensor, GetParam(), data_, folder.path());
  }

  TokenFile data_{repository("configs/tiny/train.h5")};
};

/// Stopped and started again and again, as by signals. `stop` is asked behind the update, before the method's own end
/// of the step.
TEST_P(Resume, AtAnyStepIsTheStraightRunToTheBit) {
  std::vector<at::Tensor> straight{at::Tensor()};  // by step
  const SharedFolder folder(test_world()), interrupted(test_world());
  Job whole = job(mixed(), folder);
  whole.train(whole.start(), [&](int64_t /*step*/) {
    straight.push_back(whole.parameters());
    return false;
  });
  for (const int64_t stop : {1, 3, 5, 6}) {
    Job part = job(mixed(), interrupted);
    at::Tensor last;
    const TrainingState reached = part.train(part.start(), [&](int64_t step) {
      last = part.parameters();
      return step == stop;
    });
    EXPECT_EQ(reached.step, stop);
    EXPECT_TRUE(at::equal(last, straight[stop])) << "stopped in step " << stop;
  }
}

TEST_P(Resume, InAnotherLayoutGoesOnFromTheSameState) {
  const SharedFolder folder(test_world());
  Job straight = job(1, folder), resumed = job(mixed(), folder);
  const TrainingState reached = straight.train(straight.start(), [&](int64_t step) { return step == 3; });
  const at::Tensor saved = straight.parameters();
  straight.train(reached, never);
  const TrainingState state = resumed.start(folder.path() + "/checkpoint-3");
  EXPECT_EQ(state.step, 3);
  EXPECT_TRUE(at::equal(resumed.parameters(), saved)) << "loaded with tp " << mixed();
  resumed.train(state, never);
  EXPECT_LT(relative_error(resumed.parameters(), straight.parameters()), 1e-4);
}

/// The name of a case in GoogleTest's list.
std::string case_name(const testing::TestParamInfo<Setting>& info) { return info.param.name; }

}  // namespace
}  // namespace corank::test
