#include "tests/topology_cases.h"

// LoRA and full fine-tuning: every way of running them.
namespace corank::test {
namespace {

INSTANTIATE_TEST_SUITE_P(
    Settings, Topology,
    testing::Values(
        Setting{.name = "lora"}, Setting{.name = "dropout", .dropout = 0.2},
        Setting{.name = "unpacked", .packing = false},
        Setting{.name = "recompute", .dropout = 0.1, .checkpointing = Checkpointing::full},
        Setting{.name = "recompute_mlp", .checkpointing = Checkpointing::mlp},
        Setting{.name = "bfloat16", .dtype = at::kBFloat16}, Setting{.name = "full", .method = "full"},
        Setting{.name = "shared", .dropout = 0.1, .shard_base = "dp"},
        Setting{.name = "shared_full", .method = "full", .checkpointing = Checkpointing::mlp, .shard_base = "dp"},
        Setting{.name = "gpt2", .shape = "tiny-gpt2", .packing = false},
        Setting{.name = "gpt2_full", .method = "full", .shape = "tiny-gpt2", .checkpointing = Checkpointing::full}),
    case_name);

INSTANTIATE_TEST_SUITE_P(Settings, Resume,
                         testing::Values(Setting{.name = "lora", .dropout = 0.1},
                                         Setting{.name = "full", .method = "full"},
                                         Setting{.name = "shared_full", .method = "full", .shard_base = "dp"}),
                         case_name);

struct TwoSteps {
  at::Tensor masters;
  Ledger::Snapshot counted;
  std::vector<StepRecord> steps;
};

TwoSteps two_steps(const TokenFile& data, bool cross_check) {
  const SharedFolder folder(test_world());
  Job job(&test_world(), mixed(), {.name = "lora"}, data, folder.path());
  set_cross_check(job.run.mesh, cross_check);
  const Ledger::Snapshot before = job.run.ledger.snapshot();
  job.train(job.start(), [](int64_t step) { return step == 2; });
  const Ledger::Snapshot counted = difference(job.run.ledger.snapshot(), before);
  set_cross_check(job.run.mesh, true);
  return {job.run.store.masters().clone(), counted, job.records.steps};
}

TEST(CrossCheck, ChangesNeitherNumbersNorBytes) {
  const TokenFile data(repository("configs/tiny/train.h5"));
  const TwoSteps with = two_steps(data, true), without = two_steps(data, false);
  EXPECT_TRUE(at::equal(with.masters, without.masters));
  for (int p = 0; p < kNumPurposes; ++p) {
    EXPECT_EQ(with.counted[p].calls, without.counted[p].calls) << name(static_cast<Purpose>(p));
    EXPECT_EQ(with.counted[p].payload_bytes, without.counted[p].payload_bytes) << name(static_cast<Purpose>(p));
    EXPECT_EQ(with.counted[p].sent_bytes, without.counted[p].sent_bytes) << name(static_cast<Purpose>(p));
  }
  expect_same_steps(with.steps, without.steps, /*bound=*/0);
}

}  // namespace
}  // namespace corank::test
