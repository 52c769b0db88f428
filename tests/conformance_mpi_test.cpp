#include "data/storage.h"
#include "tests/conformance.h"
#include "trainer/files/adapter_file.h"
#include "trainer/methods/merge_config.h"

// The tables of methods and formats against the rules of conformance.h. A new line of methods.cpp or formats.cpp is
// tested without a change here; variants() names what keys make of a method.
namespace corank::test {
namespace {

constexpr int64_t kSteps = 3;
constexpr double kReloaded = 1e-6;  ///< relative, of the loss of the next step

/// Linears of one style under one combination.
struct Case {
  Combination combination;
  Split split = Split::column;
};

std::string name_of(const Combination& c) { return c.name(); }
std::string name_of(const Case& c) { return c.combination.name() + (c.split == Split::row ? "_row" : "_column"); }
void PrintTo(const Case& c, std::ostream* out) { *out << name_of(c); }

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const Combination& c : combinations()) {
    for (const Split split : {Split::column, Split::row}) all.push_back({c, split});
  }
  return all;
}

template <class T>
std::string case_name(const testing::TestParamInfo<T>& info) {
  return name_of(info.param);
}

class Linears : public testing::TestWithParam<Case> {};

/// Split over all ranks of the job.
TEST_P(Linears, ForwardIsTheProductWithTheMergedWeight) {
  Layers layers(&test_world(), test_world().size(), GetParam().combination, at::kFloat);
  randomise(parts_of(layers));
  const MergedDeviation deviation = merged_deviation(parts_of(layers), GetParam().split);
  EXPECT_LT(deviation.forward, kSingle);
  EXPECT_GT(deviation.update, 1e-2) << "too small to be seen";
}

TEST_P(Linears, GradientsAreTheFiniteDifferences) {
  Layers layers(&test_world(), test_world().size(), GetParam().combination, at::kDouble);
  const Parts p = parts_of(layers);
  randomise(p);
  EXPECT_LT(gradient_deviation(p, GetParam().split, follow_magnitudes(p)), kGradient);
}

INSTANTIATE_TEST_SUITE_P(Conformance, Linears, testing::ValuesIn(cases()), case_name<Case>);

/// Of two ranks 2 x 1 and 1 x 2, of four 2 x 2 and 1 x 4.
std::vector<int> layouts() {
  std::vector<int> sizes = tensor_sizes();
  if (sizes.size() > 2) sizes.erase(sizes.begin());
  return sizes;
}

class Runs : public testing::TestWithParam<Combination> {};

TEST_P(Runs, StepsAreTheSameInEveryLayoutAndChangeTheAdapterAlone) {
  const std::vector<std::string> none;
  std::vector<double> first;
  for (const int tensor : layouts()) {
    SCOPED_TRACE("tp " + std::to_string(tensor));
    TinyRun run(&test_world(), tensor, GetParam());
    const Parts p = parts_of(run);
    const Weights base = frozen_weights(p), parameters = parameters_of(p);
    std::vector<std::string> unequal;
    const auto losses = losses_of(run, kSteps, [&] {
      for (const std::string& name : unequal_replicas(p.mesh, p.store)) unequal.push_back(name);
    });
    if (first.empty()) first = losses;
    EXPECT_LT(loss_deviation(losses, first), kSingle);
    EXPECT_EQ(unequal, none) << "replicas";
    EXPECT_EQ(names_where(/*equal=*/false, base, frozen_weights(p)), none) << "frozen, and changed";
    EXPECT_EQ(names_where(/*equal=*/true, parameters, parameters_of(p)), none) << "trained, and not changed";
    for (const Split split : {Split::column, Split::row}) EXPECT_LT(merged_deviation(p, split).forward, kSingle);
  }
}

/// Full tensors of everything that a run goes on from: parameters, moments, the method's state.
Weights state_of(TinyRun& run) {
  Weights all = run.method->extra_tensors(run.mesh.tp());
  std::vector<std::pair<std::string, at::Tensor>> buffers = run.method->state();
  buffers.emplace_back("parameters", run.store.masters());
  buffers.emplace_back("exp_avg", run.optimizer->exp_avg());
  buffers.emplace_back("exp_avg_sq", run.optimizer->exp_avg_sq());
  for (const auto& [buffer, flat] : buffers) {
    for (const auto& [name, tensor] : run.store.gather(flat, run.mesh.tp())) all.emplace_back(buffer + name, tensor);
  }
  return all;
}

Checkpoints checkpoints_of(TinyRun& run, DiskStorage& disk, const std::string& folder) {
  return {disk,           folder,     {"same run", run.method->config(), "tiny"}, {1}, run.mesh, run.store,
          *run.optimizer, *run.method};
}

/// Full fine-tuning leaves no folder of an adapter; that of PiSSA is one on W, which is quantised otherwise than
/// W - s B A.
bool folder_is_exact(const Combination& c) {
  return !c.trains_base() && (c.format == "none" || make_method(c.config())->beyond_quantised().empty());
}

/// Collective over the world. The folder that PEFT gets of `run`, read back.
SavedAdapter written_and_read(const TinyRun& run, const Combination& c, const std::string& folder) {
  const SavedAdapter collected = collect_adapter(run.store, *run.method, {"", c.config(), ""}, run.mesh.tp());
  DiskStorage disk;
  if (test_world().rank() == 0) write_peft_folder(disk, folder, collected);
  MPI_Barrier(test_world().comm());
  return read_adapter(folder);
}

TEST_P(Runs, WhatIsSavedGoesOnInAnotherLayout) {
  const Combination c = GetParam();
  const SharedFolder folder(test_world());
  const int split = tensor_sizes().back(), other = std::max(1, split / 2);
  TinyRun saved(&test_world(), split, c), resumed(&test_world(), other, c);
  losses_of(saved, 2);
  DiskStorage disk;
  checkpoints_of(saved, disk, folder.path()).save({2, saved.batches.state()});
  Checkpoints checkpoints = checkpoints_of(resumed, disk, folder.path());
  resumed.batches.restore(checkpoints.load(*checkpoints.newest()).loader);
  EXPECT_EQ(names_where(/*equal=*/false, state_of(saved), state_of(resumed)), std::vector<std::string>{});

  std::unique_ptr<TinyRun> started;
  if (folder_is_exact(c)) {
    const SavedAdapter file = written_and_read(saved, c, folder.path() + "/adapter");
    const AdapterConfig config = merge_with_file(c.config(), {}, file.config, module_names(*saved.model));
    started = std::make_unique<TinyRun>(&test_world(), other, c, config, &file);
    started->batches.restore(saved.batches.state());
  }
  const double loss = saved.train(3);
  EXPECT_NEAR(resumed.train(3) / loss, 1, kReloaded);
  if (started) {
    EXPECT_NEAR(started->train(3) / loss, 1, kReloaded);
  }
}

INSTANTIATE_TEST_SUITE_P(Conformance, Runs, testing::ValuesIn(combinations()), case_name<Combination>);

Combination adalora(const std::string& format = "none") { return {{"adalora", small("adalora")}, format}; }

TEST(AdaLora, RegularisersGradientIsTheFiniteDifferenceInEveryLayout) {
  for (const int tensor : tensor_sizes()) {
    Layers layers(&test_world(), tensor, adalora(), at::kDouble);
    const Parts p = parts_of(layers);
    randomise(p);
    for (const Split split : {Split::column, Split::row}) {
      const double deviation = regulariser_deviation(p, split, [&] {
        reduce_gradients(p);
        p.method.add_gradients(1, p.mesh);
      });
      EXPECT_LT(deviation, kGradient) << "tp " << tensor;
    }
  }
}

/// methods 13, row 22.
TEST(AdaLora, RanksChosenAreThoseOfOneRankInEveryLayout) {
  for (const std::string& format : format_names()) {
    at::Tensor first;
    for (const int tensor : tensor_sizes()) {
      TinyRun run(&test_world(), tensor, adalora(format));
      std::vector<at::Tensor> kept;
      losses_of(run, 6, [&] { kept.push_back(kept_ranks(parts_of(run))); });
      const at::Tensor all = at::stack(kept);
      if (!first.defined()) first = all;
      EXPECT_TRUE(at::equal(all, first)) << format << " tp " << tensor;
      EXPECT_EQ(all[5].sum().item<double>(), 3 * 14) << "ranks that live at the end";
    }
  }
}

/// methods 13, row 21.
TEST(Dora, NormsAreThoseOfTheFullWeightOnEveryRank) {
  for (const std::string& format : format_names()) {
    for (const int tensor : tensor_sizes()) {
      Layers layers(&test_world(), tensor, {{"dora", small("dora")}, format}, at::kFloat);
      const Parts p = parts_of(layers);
      randomise(p);
      p.method.initialise(p.mesh);  // the magnitudes become the norms
      for (const Split split : {Split::column, Split::row}) EXPECT_LT(norm_deviation(p, split), 1e-6) << format;
      EXPECT_EQ(unequal_replicas(p.mesh, p.store), std::vector<std::string>{}) << format << " tp " << tensor;
    }
  }
}

/// methods 13, row 24: the number of targets differs from sequence to sequence.
TEST(Batches, OneSequenceOrFourInAMicroBatchIsTheSameStep) {
  for (const std::string& method : method_names()) {
    const Combination c{{method, small(method)}, "none"};
    std::vector<std::vector<double>> losses;
    for (const int64_t sequences : {1, 4}) {
      TinyRun run(&test_world(), test_world().size(), c);
      LoaderOptions options = tiny_batches(run.mesh);
      options.sampler.packing = false;
      options.micro_batch_size = sequences;
      Loader batches(run.data, options);
      losses.emplace_back();
      for (int64_t step = 1; step <= kSteps; ++step) {
        const StepBatches next = batches.next();
        std::set<int64_t> targets;
        for (const Batch& batch : next.micro_batches) targets.insert(batch.num_targets());
        EXPECT_TRUE(sequences == 4 || targets.size() > 1) << "equal counts would hide a wrong mean";
        losses.back().push_back(run.step(next, step, tiny_rate(parts_of(run))).loss);
      }
    }
    EXPECT_LT(loss_deviation(losses[1], losses[0]), kSingle) << method;
  }
}

/// methods 13, row 26: of the full gradients, each once, in every layout; golden_test compares it with torch's.
TEST(Gradients, NormIsThatOfTheFullGradients) {
  for (const std::string& method : method_names()) {
    for (const int tensor : layouts()) {
      TinyRun run(&test_world(), tensor, {{method, small(method)}, "none"});
      losses_of(run, 1);
      accumulate(run, run.batches.next());
      run.reducer->reduce();
      std::vector<at::Tensor> all;
      for (const auto& entry : run.store.gather(run.store.gradients(), run.mesh.tp())) {
        all.push_back(entry.second.flatten());
      }
      const at::Tensor norm = at::linalg_vector_norm(at::cat(all), 2, {}, false, at::kDouble);
      EXPECT_NEAR((gradient_norm(run.store, run.mesh).to(at::kCPU) / norm).item<double>(), 1, 1e-6) << method;
    }
  }
}

/// A format's shards are parts of the whole weight, to the bit.
TEST(Formats, EveryLayoutHasTheWeightOfOneRank) {
  for (const std::string& format : format_names()) {
    for (const int tensor : tensor_sizes()) {
      const Combination lora{{"lora", small("lora")}, format};
      Layers layers(&test_world(), tensor, lora, at::kFloat), alone(nullptr, 1, lora, at::kFloat);
      for (const Split split : {Split::column, Split::row}) {
        EXPECT_TRUE(at::equal(full_weights(parts_of(layers), split), full_weights(parts_of(alone), split))) << format;
      }
    }
  }
}

}  // namespace
}  // namespace corank::test
