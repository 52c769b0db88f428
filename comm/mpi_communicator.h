#pragma once
#include <limits>
#include <memory>
#include <optional>

#include "comm/communicator.h"
#include "comm/world.h"

namespace corank {

struct MpiOptions {
  int64_t max_message_bytes = std::numeric_limits<int>::max();  ///< MPI counts in int; tests make it small
  std::optional<int> host = {};  ///< a number that ranks of one host share: the world's; tests pretend others
};

/// Collective over the world. CPU tensors over MPI. Its collectives are rings of messages between neighbours, which
/// send what ring_bytes says, to the byte: the algorithms that MPI libraries choose by size, topology and version do
/// not. A sum over three ranks or more starts at another rank for each part of the tensor; it depends on the number of
/// ranks and on their hosts, on nothing else.
std::unique_ptr<Communicator> make_mpi_communicator(const World& world, Ledger& ledger, const MpiOptions& options = {});

}  // namespace corank
