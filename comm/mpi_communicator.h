#pragma once
#include <limits>
#include <memory>

#include "comm/communicator.h"
#include "comm/world.h"

namespace corank {

/// Collective over the world. CPU tensors over MPI. MPI counts in int: longer tensors travel in calls of at most
/// `max_elements` elements, counted over all ranks of the group; tests make it small.
std::unique_ptr<Communicator> make_mpi_communicator(const World& world, Ledger& ledger,
                                                    int64_t max_elements = std::numeric_limits<int>::max());

}  // namespace corank
