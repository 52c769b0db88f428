#pragma once
#include <vector>

#include "comm/world.h"

namespace corank {

/// The World that the main of the MPI tests has started.
const World& test_world();

/// Sizes of tensor-parallel groups that the job's ranks can form: 1, 2 and 4 where they divide.
std::vector<int> tensor_sizes();

}  // namespace corank
