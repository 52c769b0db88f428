#pragma once
#include "comm/world.h"

namespace corank {

/// The World that the main of the MPI tests has started.
const World& test_world();

}  // namespace corank
