#include "tests/topology_cases.h"

// Every other method of the table, and every format of the base, in every layout.
namespace corank::test {
namespace {

const Setting kMethods[] = {
    {.name = "dora", .method = "dora"},
    {.name = "dora_dropout", .method = "dora", .dropout = 0.2},
    {.name = "adalora", .method = "adalora"},
    {.name = "mora_sharing", .method = "mora"},
    {.name = "mora_blocks", .method = "mora", .mora_type = 2},
    {.name = "mora_rotation", .method = "mora", .mora_type = 6},
    {.name = "pissa", .method = "pissa"},
    {.name = "pissa_nf4", .method = "pissa", .quantization = "nf4"},
    {.name = "modules_to_save", .modules_to_save = {"embed_tokens", "norm", "lm_head"}},
    {.name = "nf4", .quantization = "nf4"},
    {.name = "int8", .quantization = "int8"},
    {.name = "dora_nf4", .method = "dora", .quantization = "nf4"},
    {.name = "gpt2_dora", .method = "dora", .shape = "tiny-gpt2"},
    {.name = "gpt2_adalora", .method = "adalora", .shape = "tiny-gpt2"},
    {.name = "gpt2_pissa", .method = "pissa", .shape = "tiny-gpt2"},
    {.name = "gpt2_modules_to_save", .shape = "tiny-gpt2", .modules_to_save = {"ln_f"}},
};

const Setting kResumed[] = {
    {.name = "dora", .method = "dora", .dropout = 0.1},
    {.name = "adalora", .method = "adalora"},
    {.name = "pissa", .method = "pissa"},
    {.name = "gpt2_adalora", .method = "adalora", .shape = "tiny-gpt2"},
    {.name = "mora_rotation", .method = "mora", .mora_type = 6},
    {.name = "modules_to_save", .modules_to_save = {"embed_tokens", "norm", "lm_head"}},
    {.name = "dora_nf4", .method = "dora", .quantization = "nf4"},
};

INSTANTIATE_TEST_SUITE_P(Methods, Topology, testing::ValuesIn(kMethods), case_name);
INSTANTIATE_TEST_SUITE_P(Methods, Resume, testing::ValuesIn(kResumed), case_name);

/// What no rank can hold a part of.
TEST(LinearsOfSeveralMatrices, AreRefusedByNameWhereTheyCannotBeSplit) {
  if (test_world().size() % 2 != 0) GTEST_SKIP() << "needs a split";
  for (const Setting& setting : {Setting{.name = "mora", .method = "mora", .shape = "tiny-gpt2"},
                                 Setting{.name = "nf4", .shape = "tiny-gpt2", .quantization = "nf4"},
                                 Setting{.name = "int8", .shape = "tiny-gpt2", .quantization = "int8"}}) {
    SCOPED_TRACE(setting.name);
    try {
      TrainingRun run(&test_world(), 2, tiny(setting), adapter(setting));
      ADD_FAILURE() << "accepted";
    } catch (const ConfigError& e) {
      EXPECT_NE(std::string(e.what()).find("transformer.h.0.attn.c_attn"), std::string::npos) << e.what();
    }
  }
}

}  // namespace
}  // namespace corank::test
