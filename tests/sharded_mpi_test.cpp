#include <algorithm>

#include "tests/mpi_main.h"
#include "tests/support.h"
#include "trainer/weights/formats.h"
#include "trainer/weights/sharded.h"

// A base that the data-parallel ranks share between them: the same numbers as with a resident one, and as many bytes as
// were predicted.
namespace corank::test {
namespace {

constexpr int64_t kSteps = 2;

ModelOptions sharded_model(const std::string& format, Checkpointing checkpointing) {
  ModelOptions options;
  options.shape = "tiny-llama";
  options.dtype = at::kFloat;
  options.quantization = format;
  options.checkpointing = checkpointing;
  options.max_positions = 64;
  return options;
}

struct Outcome {
  std::vector<double> losses;
  at::Tensor masters;  ///< of this rank
  NamedTensors trained;
  int64_t base_bytes = 0;
};

const at::Tensor& by_name(const NamedTensors& tensors, const std::string& name) {
  return std::find_if(tensors.begin(), tensors.end(), [&](const auto& one) { return one.first == name; })->second;
}

/// Collective over the world. Trains, and holds what is counted in each step against what is predicted.
Outcome train(const std::string& shard_base, const AdapterConfig& adapter, ModelOptions options, int tensor = 1) {
  const Mesh& mesh = shared_mesh(&test_world(), tensor).mesh;
  options.residency = make_residency(shard_base, mesh.dp());
  TrainingRun run(&test_world(), tensor, options, adapter);
  const TokenFile data(repository("configs/tiny/train.h5"));
  Loader batches(data, {{64, true, true, 7}, 2 * mesh.dp().size(), 1, mesh.dp().rank(), mesh.dp().size()});
  Outcome outcome;
  for (int64_t step = 1; step <= kSteps; ++step) {
    const StepBatches next = batches.next();
    const Ledger::Snapshot before = run.ledger.snapshot();
    outcome.losses.push_back(run.step(next, step, 1e-2).loss);
    const auto counted = difference(run.ledger.snapshot(), before);
    expect_bytes(counted, predicted_bytes(run, options, adapter, next, step, /*asked=*/false),
                 adapter.method + " " + options.quantization);
  }
  outcome.masters = run.store.masters().clone();
  outcome.trained = run.store.gather(run.store.masters(), mesh.tp());
  outcome.base_bytes = base_bytes(*run.model);
  return outcome;
}

AdapterConfig adapter_of(const std::string& method, std::vector<std::string> targets = {}) {
  AdapterConfig config;
  config.method = method;
  config.target_modules.names = std::move(targets);
  return config;
}

void expect_same(const Outcome& sharded, const Outcome& resident, const std::string& what) {
  EXPECT_EQ(sharded.losses, resident.losses) << what;
  EXPECT_TRUE(at::equal(sharded.masters, resident.masters)) << what;
}

TEST(ShardedBase, EveryMethodOverEveryFormatTrainsTheSameAdapterToTheBit) {
  for (const std::string& format : format_names()) {
    for (const char* method : {"lora", "dora", "mora", "adalora", "pissa"}) {
      const ModelOptions options = sharded_model(format, Checkpointing::none);
      const AdapterConfig adapter = adapter_of(method);
      expect_same(train("dp", adapter, options), train("none", adapter, options), std::string(method) + " " + format);
    }
  }
}

TEST(ShardedBase, RecomputedLayersGatherAgain) {
  for (const Checkpointing checkpointing : {Checkpointing::mlp, Checkpointing::full}) {
    const ModelOptions options = sharded_model("none", checkpointing);
    for (const auto& targets : std::vector<std::vector<std::string>>{{}, {"v_proj"}, {"down_proj"}}) {
      const AdapterConfig adapter = adapter_of("lora", targets);
      expect_same(train("dp", adapter, options), train("none", adapter, options), "recomputed");
    }
  }
}

TEST(ShardedBase, TargetsDecideWhatBackwardGathers) {
  const ModelOptions options = sharded_model("nf4", Checkpointing::none);
  for (const auto& targets : std::vector<std::vector<std::string>>{{"q_proj", "v_proj"}, {"o_proj"}, {"up_proj"}}) {
    const AdapterConfig adapter = adapter_of("dora", targets);
    expect_same(train("dp", adapter, options), train("none", adapter, options), "targets");
  }
}

/// Two parts are added in one way only; of more, a ring adds those of a weight in another order than those of the
/// buffer.
void expect_close(const Outcome& sharded, const Outcome& resident, const std::string& what) {
  for (size_t i = 0; i < sharded.losses.size(); ++i) EXPECT_NEAR(sharded.losses[i], resident.losses[i], 1e-5) << what;
  ASSERT_EQ(sharded.trained.size(), resident.trained.size());
  for (size_t i = 0; i < sharded.trained.size(); ++i) {
    const auto& [name, tensor] = sharded.trained[i];
    const at::Tensor& other = by_name(resident.trained, name);
    EXPECT_LT(relative_error(tensor, other), test_world().size() > 1 ? 1e-5 : 1e-12) << name << ' ' << what;
  }
}

TEST(ShardedBase, WhatTrainsIsSharedToo) {
  for (const Checkpointing checkpointing : {Checkpointing::none, Checkpointing::mlp, Checkpointing::full}) {
    const ModelOptions options = sharded_model("none", checkpointing);
    const AdapterConfig adapter = adapter_of("full");
    expect_close(train("dp", adapter, options), train("none", adapter, options), "full");
  }
}

/// A checkpoint of the one goes on as the other.
TEST(ShardedBase, CheckpointsHoldFullTensors) {
  const ModelOptions options = sharded_model("none", Checkpointing::none);
  const Mesh& mesh = shared_mesh(&test_world(), 1).mesh;
  ModelOptions shared = options;
  shared.residency = make_residency("dp", mesh.dp());
  TrainingRun whole(&test_world(), 1, options, adapter_of("full")), parts(&test_world(), 1, shared, adapter_of("full"));
  for (const auto& [name, tensor] : whole.store.gather(whole.store.masters(), mesh.tp())) {
    parts.store.load(name, tensor + 1);
  }
  for (const auto& [name, tensor] : parts.store.gather(parts.store.masters(), mesh.tp())) {
    const auto& all = whole.store.parameters();
    const auto same = std::find_if(all.begin(), all.end(), [&](const auto& p) { return p.spec.name == name; });
    EXPECT_TRUE(at::equal(tensor, (same->master + 1).cpu())) << name;
  }
  EXPECT_LT(parts.store.num_local(), whole.store.num_local() / std::min(test_world().size(), 2) + 40000);
}

TEST(ShardedBase, ARankKeepsItsPart) {
  const int ranks = test_world().size();
  for (const std::string& format : format_names()) {
    const ModelOptions options = sharded_model(format, Checkpointing::none);
    const AdapterConfig adapter = adapter_of("lora");
    const int64_t whole = train("none", adapter, options).base_bytes, part = train("dp", adapter, options).base_bytes;
    const Mesh& mesh = shared_mesh(&test_world(), 1).mesh;
    TrainingRun run(&test_world(), 1, options, adapter);
    int64_t linears = 0;
    for (const AdaptedLinear* linear : run.model->linears()) linears += linear->weight().bytes();
    const int64_t padding = static_cast<int64_t>(run.model->linears().size()) * (4 + mesh.dp().size()) * 256;
    EXPECT_NEAR(whole - part, linears - linears / ranks, padding) << format;
  }
}

#ifndef CORANK_GPU_TEST
/// With tensor parallelism each group of ranks with the same block of the weights shares it.
TEST(ShardedBase, WithTensorParallelism) {
  if (test_world().size() != 2) GTEST_SKIP() << "two ranks";
  const ModelOptions options = sharded_model("int8", Checkpointing::none);
  expect_same(train("dp", adapter_of("dora"), options, 2), train("none", adapter_of("dora"), options, 2), "tensor 2");
}
#endif

/// The base with one byte of one rank's part changed.
TEST(ShardedBase, APartOfAnotherWeightIsSeen) {
  if (test_world().size() == 1) GTEST_SKIP() << "nothing is gathered";
  const Mesh& mesh = shared_mesh(&test_world(), 1).mesh;
  const auto residency = make_residency("dp", mesh.dp());
  const at::Tensor w = at::arange(64 * 64, at::TensorOptions(at::kFloat).device(mesh.device())).view({64, 64});
  const at::Tensor own = mesh.dp().rank() == 1 ? w + 1 : w;  // planted: rank 1 was given another weight
  const auto bytes = residency->keep(0, {own});
  const at::Tensor gathered = bytes->on_device(Pass::forward)[0];
  EXPECT_FALSE(at::equal(gathered, w));
  EXPECT_TRUE(at::equal(gathered[0], w[0])) << "rank 0's part is whole";
}

TEST(Slots, HoldWhatWasAskedLastAndWhatComes) {
  using Orders = std::vector<int64_t>;
  Slots slots;
  EXPECT_EQ(slots.ask(0, {1, 2, 3}), Orders());
  EXPECT_EQ(slots.ask(1, {2, 3, 4}), Orders{0});
  EXPECT_TRUE(slots.has(1) && slots.has(4) && !slots.has(0));
  EXPECT_EQ(slots.ask(9), Orders{4}) << "the others were asked for, or expected, before it";
  EXPECT_TRUE(slots.has(9) && slots.has(1) && slots.has(2) && slots.has(3));
}

/// How many of a walk's weights are fetched.
int64_t fetches(const std::vector<int64_t>& orders, bool ahead) {
  Walk walk;
  int64_t count = 0;
  for (int pass = 0; pass < 2; ++pass) {
    Slots slots;
    walk.begin();
    count = 0;
    for (const int64_t order : orders) {
      walk.visit(order);
      std::vector<int64_t> wanted = ahead ? walk.next(Slots::kSlots - 1) : std::vector<int64_t>();
      const Slots before = slots;
      slots.ask(order, wanted);
      wanted.push_back(order);
      count += std::count_if(wanted.begin(), wanted.end(), [&](int64_t one) { return !before.has(one); });
    }
  }
  return count;
}

TEST(Slots, FetchingAheadFetchesNoMore) {
  std::vector<int64_t> plain, layers_again, halves_again;
  for (int64_t order = 0; order < 12; ++order) plain.push_back(order);
  layers_again = halves_again = plain;
  for (int64_t order = 12; order > 1; --order) plain.push_back(order - 1);
  for (int64_t layer = 8; layer >= 0; layer -= 4) {
    for (const int64_t i : {0, 1, 2, 3, 3, 2, 1, 0}) layers_again.push_back(layer + i);
    for (const int64_t i : {2, 3, 3, 2, 1, 0}) halves_again.push_back(layer + i);
  }
  for (const auto& orders : {plain, layers_again, halves_again}) {
    EXPECT_EQ(fetches(orders, true), fetches(orders, false));
  }
  EXPECT_EQ(fetches(plain, true), 12 + 11 - 4) << "the turn at the last layer costs nothing";
}

TEST(Walk, ForetellsWhatItHasSeen) {
  Walk walk;
  const auto go = [&](const std::vector<int64_t>& orders) {
    std::vector<int64_t> foretold;
    walk.begin();
    for (const int64_t order : orders) {
      walk.visit(order);
      const auto next = walk.next(1);
      foretold.push_back(next.empty() ? -1 : next[0]);
    }
    return foretold;
  };
  using Orders = std::vector<int64_t>;
  EXPECT_EQ(go({0, 1, 2, 1, 0}), Orders(5, -1));
  EXPECT_EQ(go({0, 1, 2, 1, 0}), (Orders{1, 2, 1, 0, -1}));
  EXPECT_EQ(go({0, 1, 2}), (Orders{1, 2, 1})) << "forward alone, as in an evaluation";
  EXPECT_EQ(go({0, 1, 2, 1, 0}), (Orders{1, 2, 1, 0, -1})) << "which is not forgotten for it";
  EXPECT_EQ(go({0, 2, 1}), (Orders{1, -1, -1})) << "another walk foretells nothing";
  EXPECT_EQ(go({0}), (Orders{2})) << "as the newest one went on";
  EXPECT_EQ(go({0, 1, 0, 2, 1}), (Orders{2, -1, -1, -1, -1}));
  walk.begin();
  walk.visit(0);
  EXPECT_EQ(walk.next(3), (Orders{1, 2})) << "each once";
}

}  // namespace
}  // namespace corank::test
