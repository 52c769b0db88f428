#pragma once
#include <cmath>
#include <set>

#include "data/storage.h"
#include "tests/mpi_main.h"
#include "tests/support.h"
#include "trainer/run/checkpoint.h"
#include "trainer/run/traffic.h"

// Suites over settings of a run, for every layout: the same losses, the same bits where tensors are replicated, the
// same bytes as predicted.
namespace corank::test {
namespace {

constexpr int64_t kSteps = 20;

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

AdapterConfig adapter(const Setting& setting) {
  AdapterConfig config;
  config.method = setting.method;
  config.lora_dropout = setting.dropout;
  config.mora_type = setting.mora_type;
  if (setting.remora_steps > 0) {
    config.remora = {
        .steps = setting.remora_steps, .types = {1, 2}, .warmup_steps = setting.remora_steps / 2, .merges = 0};
  }
  config.modules_to_save = setting.modules_to_save;
  config.adalora = {
      .init_r = 6, .target_r = 3, .tinit = 1, .tfinal = 2, .deltaT = 1, .total_step = 6, .kept_ranks = {}};
  return config;
}

LoaderOptions loader(const Setting& setting, const Mesh* mesh) {
  return {{64, setting.packing, true, 7}, 12, 1, mesh ? mesh->dp().rank() : 0, mesh ? mesh->dp().size() : 1};
}

double rate(const Setting& setting) { return setting.method == "full" ? 1e-3 : 1e-2; }

/// Losses and norms of a run on this process alone.
std::vector<StepStats> alone(const Setting& setting, const TokenFile& data, int64_t steps = kSteps) {
  TrainingRun run(nullptr, 1, tiny(setting), adapter(setting));
  Loader batches(data, loader(setting, nullptr));
  std::vector<StepStats> stats;
  for (int64_t step = 1; step <= steps; ++step) stats.push_back(run.step(batches.next(), step, rate(setting)));
  return stats;
}

/// Every bit of `tensor` is the same on all ranks of `group`.
void expect_same_bits(const at::Tensor& tensor, Communicator& group, const std::string& what) {
  const at::Tensor bits = tensor.contiguous().view(at::kInt).clone(), low = bits.clone();
  group.all_reduce(bits, ReduceOp::max, Purpose::startup);
  group.all_reduce(low, ReduceOp::min, Purpose::startup);
  EXPECT_TRUE(at::equal(bits, low)) << what;
}

void expect_replicas_equal(const TrainingRun& run, int64_t step) {
  for (const auto& p : run.store.parameters()) {
    Communicator& group = p.spec.shard.whole() ? run.mesh.world() : run.mesh.dp();
    expect_same_bits(p.master, group, p.spec.name + " after step " + std::to_string(step));
  }
}

class Topology : public testing::TestWithParam<Setting> {
 protected:
  TokenFile data_{repository("configs/tiny/train.h5")};
};

TEST_P(Topology, SameLossesAndEqualReplicasInEveryLayout) {
  const Setting setting = GetParam();
  const auto reference = alone(setting, data_);
  for (const int tensor : {1, 2, 4}) {
    if (test_world().size() % tensor != 0) continue;
    TrainingRun run(&test_world(), tensor, tiny(setting), adapter(setting));
    Loader batches(data_, loader(setting, &run.mesh));
    for (int64_t step = 1; step <= kSteps; ++step) {
      const StepStats stats = run.step(batches.next(), step, rate(setting));
      EXPECT_NEAR(stats.loss / reference[step - 1].loss, 1, setting.bound()) << "tp " << tensor << " step " << step;
      EXPECT_NEAR(stats.grad_norm / reference[step - 1].grad_norm, 1, 100 * setting.bound())
          << "tp " << tensor << " step " << step;
      EXPECT_EQ(stats.target_tokens, reference[step - 1].target_tokens);
      expect_replicas_equal(run, step);
    }
  }
}

TEST_P(Topology, TwoRunsAreEqualToTheBit) {
  const Setting setting = GetParam();
  const int tensor = test_world().size() % 2 == 0 ? 2 : 1;
  std::vector<at::Tensor> ends;
  for (int attempt = 0; attempt < 2; ++attempt) {
    TrainingRun run(&test_world(), tensor, tiny(setting), adapter(setting));
    Loader batches(data_, loader(setting, &run.mesh));
    for (int64_t step = 1; step <= 5; ++step) run.step(batches.next(), step, rate(setting));
    ends.push_back(run.store.masters().clone());
  }
  EXPECT_TRUE(at::equal(ends[0], ends[1]));
}

TEST_P(Topology, BytesPredictedEqualBytesCounted) {
  const Setting setting = GetParam();
  for (const int tensor : {1, 2, 4}) {
    if (test_world().size() % tensor != 0) continue;
    TrainingRun run(&test_world(), tensor, tiny(setting), adapter(setting));
    Loader loader_(data_, loader(setting, &run.mesh));
    const StepBatches batches = loader_.next();
    std::vector<BatchSize> sizes;
    for (const Batch& batch : batches.micro_batches) sizes.push_back({batch.num_tokens(), batch.num_targets()});
    auto predicted =
        predict_step_bytes(traffic_shape(*run.model, adapter(setting)), adapter(setting), tensor, run.mesh.dp().size(),
                           setting.dtype == at::kFloat ? 4 : 2, setting.checkpointing, sizes);
    if (test_world().size() > 1) predicted[Purpose::data_control] -= 8;  // the trainer's question whether to stop
    const Ledger::Snapshot before = run.ledger.snapshot();
    run.step(batches, 1, rate(setting));
    for (int p = 0; p < kNumPurposes; ++p) {
      const auto purpose = static_cast<Purpose>(p);
      const int64_t counted = run.ledger.snapshot()[p].payload_bytes - before[p].payload_bytes;
      const auto found = predicted.find(purpose);
      EXPECT_EQ(counted, found == predicted.end() ? 0 : found->second) << name(purpose) << " tp " << tensor;
    }
  }
}

class Resume : public testing::TestWithParam<Setting> {
 protected:
  /// Trains to `last`, from the newest checkpoint below `folder` if there is one; saves after `save_at`.
  at::Tensor train(const std::string& folder, int tensor, int64_t last, int64_t save_at) {
    const Setting setting = GetParam();
    TrainingRun run(&test_world(), tensor, tiny(setting), adapter(setting));
    Loader batches(data_, loader(setting, &run.mesh));
    DiskStorage disk;
    Checkpoints checkpoints(disk, folder, {"same run", adapter(setting), "tiny"}, {2}, run.mesh, run.store,
                            *run.optimizer, *run.method);
    TrainingState state;
    if (const auto newest = checkpoints.newest()) state = checkpoints.load(*newest);
    batches.restore(state.loader);
    for (int64_t step = state.step + 1; step <= last; ++step) {
      run.step(batches.next(), step, rate(setting));
      if (step == save_at) checkpoints.save({step, batches.state()});
    }
    const auto full = run.store.gather(run.store.masters(), run.mesh.tp());
    std::vector<at::Tensor> flat;
    for (const auto& entry : full) flat.push_back(entry.second.flatten());
    return at::cat(flat);
  }

  /// A folder that all ranks share; rank 0 owns it.
  std::string shared_folder() {
    char name[4096] = {};
    if (test_world().rank() == 0) {
      folder_ = std::make_unique<TemporaryFolder>();
      folder_->path().copy(name, sizeof name - 1);
    }
    MPI_Bcast(name, sizeof name, MPI_CHAR, 0, MPI_COMM_WORLD);
    return name;
  }

  TokenFile data_{repository("configs/tiny/train.h5")};
  std::unique_ptr<TemporaryFolder> folder_;
};

TEST_P(Resume, AtAnyStepIsTheStraightRunToTheBit) {
  const int tensor = test_world().size() % 2 == 0 ? 2 : 1;
  const at::Tensor straight = train(shared_folder(), tensor, 6, 0);
  for (const int64_t stop : {1, 3, 5}) {
    const std::string folder = shared_folder();
    train(folder, tensor, stop, stop);
    MPI_Barrier(MPI_COMM_WORLD);
    EXPECT_TRUE(at::equal(train(folder, tensor, 6, 0), straight)) << "stopped after step " << stop;
    MPI_Barrier(MPI_COMM_WORLD);
  }
}

TEST_P(Resume, InAnotherLayoutGoesOnFromTheSameState) {
  const int other = test_world().size() % 2 == 0 ? 2 : 1;
  const std::string folder = shared_folder();
  const at::Tensor saved = train(folder, 1, 3, 3);
  MPI_Barrier(MPI_COMM_WORLD);
  EXPECT_TRUE(at::equal(train(folder, other, 3, 0), saved)) << "loaded with tp " << other;
  MPI_Barrier(MPI_COMM_WORLD);
  EXPECT_LT(relative_error(train(folder, other, 6, 0), train(folder, 1, 6, 0)), 1e-4);
  MPI_Barrier(MPI_COMM_WORLD);
}

/// The name of a case in GoogleTest's list.
std::string case_name(const testing::TestParamInfo<Setting>& info) { return info.param.name; }

}  // namespace
}  // namespace corank::test
