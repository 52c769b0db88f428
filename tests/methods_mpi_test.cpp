#include "tests/topology_cases.h"

// Every other method of the table, in every layout.
namespace corank::test {
namespace {

INSTANTIATE_TEST_SUITE_P(
    Methods, Topology,
    testing::Values(Setting{.name = "dora", .method = "dora"},
                    Setting{.name = "dora_dropout", .method = "dora", .dropout = 0.2},
                    Setting{.name = "adalora", .method = "adalora"}, Setting{.name = "mora_sharing", .method = "mora"},
                    Setting{.name = "mora_blocks", .method = "mora", .mora_type = 2},
                    Setting{.name = "mora_rotation", .method = "mora", .mora_type = 6},
                    Setting{.name = "modules_to_save", .modules_to_save = {"embed_tokens", "norm", "lm_head"}}),
    case_name);

INSTANTIATE_TEST_SUITE_P(Methods, Resume,
                         testing::Values(Setting{.name = "dora", .method = "dora", .dropout = 0.1},
                                         Setting{.name = "adalora", .method = "adalora"}),
                         case_name);

}  // namespace
}  // namespace corank::test
