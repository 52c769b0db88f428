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
        Setting{.name = "gpt2", .shape = "tiny-gpt2", .packing = false},
        Setting{.name = "gpt2_full", .method = "full", .shape = "tiny-gpt2", .checkpointing = Checkpointing::full}),
    case_name);

INSTANTIATE_TEST_SUITE_P(Settings, Resume,
                         testing::Values(Setting{.name = "lora", .dropout = 0.1},
                                         Setting{.name = "full", .method = "full"}),
                         case_name);

}  // namespace
}  // namespace corank::test
