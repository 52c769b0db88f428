#include "tests/topology_cases.h"

// Every other method of the table, in every layout.
namespace corank::test {
namespace {

INSTANTIATE_TEST_SUITE_P(Methods, Topology,
                         testing::Values(Setting{.name = "dora", .method = "dora"},
                                         Setting{.name = "dora_dropout", .method = "dora", .dropout = 0.2},
                                         Setting{.name = "adalora", .method = "adalora"}),
                         case_name);

INSTANTIATE_TEST_SUITE_P(Methods, Resume,
                         testing::Values(Setting{.name = "dora", .method = "dora", .dropout = 0.1},
                                         Setting{.name = "adalora", .method = "adalora"}),
                         case_name);

}  // namespace
}  // namespace corank::test
