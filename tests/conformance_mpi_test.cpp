#include "tests/conformance.h"

// The tables of methods and formats against the rules of conformance.h. A new line of methods.cpp or formats.cpp is
// tested without a change here; variants() names what keys make of a method.
namespace corank::test {
namespace {

constexpr int64_t kSteps = 3;

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

TEST_P(Runs, EveryLayoutHasTheSameLossesAndEqualReplicas) {
  std::vector<double> first;
  for (const int tensor : layouts()) {
    TinyRun run(&test_world(), tensor, GetParam());
    std::vector<std::string> unequal;
    const auto losses = losses_of(run, kSteps, [&] {
      for (const std::string& name : unequal_replicas(parts_of(run))) unequal.push_back(name);
    });
    if (first.empty()) first = losses;
    EXPECT_LT(loss_deviation(losses, first), kSingle) << "tp " << tensor;
    EXPECT_EQ(unequal, std::vector<std::string>{}) << "tp " << tensor;
  }
}

TEST_P(Runs, StepsChangeEveryParameterAndNothingElse) {
  TinyRun run(&test_world(), tensor_sizes().back(), GetParam());
  const Parts p = parts_of(run);
  const Weights base = frozen_weights(p), parameters = parameters_of(p);
  losses_of(run, kSteps);
  EXPECT_EQ(names_where(/*equal=*/false, base, frozen_weights(p)), std::vector<std::string>{});
  EXPECT_EQ(names_where(/*equal=*/true, parameters, parameters_of(p)), std::vector<std::string>{});
  for (const Split split : {Split::column, Split::row}) EXPECT_LT(merged_deviation(p, split).forward, kSingle);
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
      EXPECT_EQ(unequal_replicas(p), std::vector<std::string>{}) << format << " tp " << tensor;
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
