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
};

const Setting kResumed[] = {
    {.name = "dora", .method = "dora", .dropout = 0.1},
    {.name = "adalora", .method = "adalora"},
    {.name = "pissa", .method = "pissa"},
};

INSTANTIATE_TEST_SUITE_P(Methods, Topology, testing::ValuesIn(kMethods), case_name);
INSTANTIATE_TEST_SUITE_P(Methods, Resume, testing::ValuesIn(kResumed), case_name);

}  // namespace
}  // namespace corank::test
