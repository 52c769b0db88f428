#include "configs/error.h"
#include "data/storage.h"
#include "tests/mpi_main.h"
#include "tests/support.h"
#include "trainer/files/adapter_file.h"
#include "trainer/methods/mora.h"
#include "trainer/methods/rank_budget.h"
#include "trainer/run/checkpoint.h"

// The ways to sum gradients, in training. Summed exactly, losses and adapter are the same bits, however many
// data-parallel ranks there are: a job is trained twice, by all of its ranks and by as few as its tensor-parallel size
// asks for. In bfloat16, what rounding leaves over is state of the run.
namespace corank::test {
namespace {

constexpr int64_t kSteps = 4;
constexpr int64_t kHalf = 2;
constexpr int64_t kSequences = 10;  // five micro-batches of two: no number of ranks but one divides them

struct SumCase {
  std::string name, method = "lora", quantization = "none", shape = "tiny-llama";
  at::ScalarType dtype = at::kFloat;
  double dropout = 0;
  std::vector<std::string> modules_to_save = {};
  int64_t remora_steps = 0;
};

void PrintTo(const SumCase& c, std::ostream* out) { *out << c.name; }

AdapterConfig config_of(const SumCase& c) {
  AdapterConfig config;
  config.method = c.method;
  config.lora_dropout = c.dropout;
  config.modules_to_save = c.modules_to_save;
  MoraConfig& mora = config.options.edit<MoraConfig>();
  if (c.remora_steps > 0) {
    mora.steps = c.remora_steps;
    mora.types = {1, 2};
    mora.warmup_steps = 1;
  }
  config.options.edit<AdaLoraConfig>() = {
      .init_r = 6, .target_r = 3, .tinit = 1, .tfinal = 2, .deltaT = 1, .total_step = kSteps, .kept_ranks = {}};
  return config;
}

ModelOptions model_of(const SumCase& c) {
  ModelOptions options;
  options.shape = c.shape;
  options.dtype = c.dtype;
  options.quantization = c.quantization;
  options.max_positions = 64;
  return options;
}

LoaderOptions order(const Mesh& mesh) {
  return {{64, true, true, 7}, kSequences, 2, mesh.dp().rank(), mesh.dp().size(), /*uneven=*/true};
}

/// All that a run leaves, to the bit.
struct Bits {
  std::vector<double> losses, norms;
  double eval_loss = 0, eval_accuracy = 0;
  std::string adapter;  ///< the file's bytes

  bool operator==(const Bits&) const = default;
};

/// What is trained over one mesh.
struct SumRun {
  SumRun(SharedMesh& shared, const SumCase& c, const std::string& how)
      : one(c), run(shared, model_of(c), config_of(c), how), batches(data, order(run.mesh)) {}

  Checkpoints checkpoints(const std::string& folder) {
    return {disk, folder, identity(), {}, run.mesh, run.store, *run.optimizer, *run.sum, *run.method};
  }
  RunIdentity identity() const { return {"same run", config_of(one), "tiny"}; }

  /// Steps after `done` up to `last`; the bytes of each are as predicted.
  void train(int64_t done, int64_t last, Bits& bits) {
    for (int64_t step = done + 1; step <= last; ++step) {
      const StepBatches next = batches.next();
      const Ledger::Snapshot before = run.ledger.snapshot();
      const StepStats stats = run.step(next, step, 1e-2);
      expect_bytes(difference(run.ledger.snapshot(), before),
                   predicted_bytes(run, model_of(one), config_of(one), next, step), one.name);
      bits.losses.push_back(stats.loss);
      bits.norms.push_back(stats.grad_norm);
    }
  }
  void end(Bits& bits) const {
    const auto held_out = evaluation_batches(TokenFile(repository("configs/tiny/eval.h5")), order(run.mesh));
    const EvalResult result = evaluate(run.mesh, *run.model, held_out);
    bits.eval_loss = result.loss;
    bits.eval_accuracy = result.token_accuracy;
    bits.adapter = adapter_h5_image(collect_adapter(run.store, *run.method, identity(), run.mesh.tp()));
  }

  SumCase one;
  TokenFile data{repository("configs/tiny/train.h5")};
  DiskStorage disk;
  TrainingRun run;
  Loader batches;
};

SharedMesh& all_ranks(int tensor) { return shared_mesh(&test_world(), tensor); }
SharedMesh& few_ranks(int tensor) { return shared_mesh(&test_world(), tensor, test_world().size() / tensor); }

Bits trained(SharedMesh& shared, const SumCase& c, const std::string& how) {
  SumRun job(shared, c, how);
  Bits bits;
  job.train(0, kSteps, bits);
  job.end(bits);
  return bits;
}

/// Trained by `first` up to the half, saved, and by `second` to the end. Each mesh of `first` has a folder of its own.
Bits resumed(SharedMesh& first, SharedMesh& second, const SumCase& c, const std::string& folder,
             const std::string& how = "exact") {
  Bits bits;
  const std::string own = folder + "/" + std::to_string(test_world().rank() / first.mesh.world().size());
  SumRun begun(first, c, how), ended(second, c, how);
  begun.train(0, kHalf, bits);
  begun.checkpoints(own).save({kHalf, begun.batches.state()});
  MPI_Barrier(test_world().comm());
  Checkpoints checkpoints = ended.checkpoints(own);
  ended.batches.restore(checkpoints.load(folder + "/0/checkpoint-" + std::to_string(kHalf)).loader);
  ended.train(kHalf, kSteps, bits);
  ended.end(bits);
  return bits;
}

class Reproducible : public testing::TestWithParam<SumCase> {};

TEST_P(Reproducible, NoBitDependsOnTheNumberOfDataParallelRanks) {
  for (const int tensor : tensor_sizes()) {
    if (tensor == test_world().size()) continue;  // one data-parallel rank
    SCOPED_TRACE("tp " + std::to_string(tensor));
    const Bits few = trained(few_ranks(tensor), GetParam(), "exact");
    EXPECT_TRUE(few == trained(all_ranks(tensor), GetParam(), "exact"));
    EXPECT_LT(few.losses.back(), few.losses.front());
  }
}

TEST_P(Reproducible, NorWhereItIsResumedByAnotherNumberOfRanks) {
  const SharedFolder grown(test_world()), shrunk(test_world());
  const Bits straight = trained(few_ranks(1), GetParam(), "exact");
  EXPECT_TRUE(straight == resumed(few_ranks(1), all_ranks(1), GetParam(), grown.path()));
  EXPECT_TRUE(straight == resumed(all_ranks(1), few_ranks(1), GetParam(), shrunk.path()));
}

INSTANTIATE_TEST_SUITE_P(
    Settings, Reproducible,
    testing::Values(SumCase{.name = "lora", .dropout = 0.1}, SumCase{.name = "lora_bfloat16", .dtype = at::kBFloat16},
                    SumCase{.name = "lora_nf4", .quantization = "nf4", .dtype = at::kBFloat16},
                    SumCase{.name = "lora_int8", .quantization = "int8"}, SumCase{.name = "dora", .method = "dora"},
                    SumCase{.name = "dora_nf4", .method = "dora", .quantization = "nf4"},
                    SumCase{.name = "adalora", .method = "adalora"}, SumCase{.name = "mora", .method = "mora"},
                    SumCase{.name = "remora", .method = "mora", .remora_steps = 2},
                    SumCase{.name = "pissa", .method = "pissa"}, SumCase{.name = "gpt2", .shape = "tiny-gpt2"},
                    SumCase{.name = "lora_modules_to_save", .modules_to_save = {"embed_tokens", "norm", "lm_head"}}),
    [](const auto& one) { return one.param.name; });

/// The planted error: gradients added up in float32, rank by rank.
TEST(ReproducibleMutants, SumInTheOrderOfRanks) {
  for (const char* method : {"lora", "dora", "adalora", "mora", "pissa"}) {
    const SumCase c{.name = method, .method = method};
    const Bits few = trained(few_ranks(1), c, "float32"), many = trained(all_ranks(1), c, "float32");
    EXPECT_EQ(few == many, test_world().size() == 1) << method;
    EXPECT_NEAR(few.losses.back() / many.losses.back(), 1, 1e-5) << method;
    EXPECT_NEAR(few.losses.back() / trained(few_ranks(1), c, "exact").losses.back(), 1, 1e-5) << method;
  }
}

// ---- bfloat16

const SumCase kPlain{.name = "lora", .dropout = 0.1};

TEST(Bfloat16Gradients, TrainAsFloat32DoesAndGoOnWhereTheyWere) {
  for (const int tensor : tensor_sizes()) {
    SCOPED_TRACE("tp " + std::to_string(tensor));
    const SharedFolder folder(test_world());
    const Bits plain = trained(all_ranks(tensor), kPlain, "float32");
    const Bits straight = trained(all_ranks(tensor), kPlain, "bfloat16");
    for (size_t i = 0; i < plain.losses.size(); ++i) EXPECT_NEAR(straight.losses[i] / plain.losses[i], 1, 1e-3);
    EXPECT_FALSE(straight == plain);
    EXPECT_TRUE(straight == resumed(all_ranks(tensor), all_ranks(tensor), kPlain, folder.path(), "bfloat16"));
  }
}

/// Over all ranks, in float64 [everywhere + data].
at::Tensor sum_of_carried(const SumRun& job) {
  at::Tensor sum = job.run.sum->carried().to(at::kDouble);
  job.run.mesh.dp().all_reduce(sum, ReduceOp::sum, Purpose::startup);
  return sum.to(at::kCPU);
}

TEST(Bfloat16Gradients, WhatTheyLeaveOverIsDealtToOtherRanksAndNeverDropped) {
  const SharedFolder folder(test_world());
  SumRun saved(all_ranks(1), kPlain, "bfloat16"), fewer(few_ranks(1), kPlain, "bfloat16");
  Bits bits;
  saved.train(0, kHalf, bits);
  const std::string path = folder.path() + "/checkpoint-" + std::to_string(kHalf);
  saved.checkpoints(folder.path()).save({kHalf, saved.batches.state()});
  MPI_Barrier(test_world().comm());
  fewer.checkpoints(folder.path()).load(path);
  const at::Tensor sum = sum_of_carried(saved);
  EXPECT_GT(sum.abs().max().item<double>(), 0);
  EXPECT_LT(relative_error(sum_of_carried(fewer), sum), 1e-6);

  if (tensor_sizes().back() == 1) return;
  SumRun split(all_ranks(tensor_sizes().back()), kPlain, "bfloat16");
  try {
    split.checkpoints(folder.path()).load(path);
    ADD_FAILURE() << "loaded";
  } catch (const ConfigError& error) {
    EXPECT_NE(std::string(error.what()).find("parallel.tensor"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace corank::test
