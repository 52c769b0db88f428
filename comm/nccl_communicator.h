#pragma once
#include <memory>
#include <string>

#include "comm/communicator.h"
#include "comm/world.h"

namespace corank {

/// Collective over the world. CUDA tensors over NCCL, on the caller's current stream; MPI carries barrier, split and
/// the cross-check.
std::unique_ptr<Communicator> make_nccl_communicator(const World& world, Ledger& ledger);
/// "2.28.9": of the library that is loaded.
std::string nccl_version();

}  // namespace corank
