#pragma once
#include "trainer/layers/rope_table.h"
#include "trainer/models/config_file.h"

namespace corank {

/// transformers 5 writes rope_parameters {rope_theta, rope_type, ...}, earlier versions rope_theta and rope_scaling
/// {type, ...}. Each number is taken from where transformers takes it, and the keys are refused that it does not know.
RopeConfig rope_config(const ConfigFile& file, int64_t head_dim, int64_t max_positions);

}  // namespace corank
