#pragma once
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "comm/world.h"

namespace corank {

/// Names of the backends in this build: "mpi" always, "nccl" in a CUDA build.
std::vector<std::string> backend_names();
/// The backend of `parallel.backend` when the run file names none: the build decides, never what happens to be found.
std::string default_backend();

/// Versions of the communication libraries that are loaded, by name.
std::map<std::string, std::string> backend_versions();

/// Collective over the world. A communicator of all ranks over the named backend. An unknown name or one that is not in
/// this build is a ConfigError that lists what is. nccl: each rank uses the CUDA device that place_on_devices() gives
/// it and makes it the current one; a rank without a GPU, or two ranks on one GPU, are a ConfigError on every rank.
/// `ledger` is borrowed and outlives the communicator.
std::unique_ptr<Communicator> make_communicator(const std::string& backend, const World& world, Ledger& ledger);

/// A world of one on `device` (CUDA: with its index): every collective is the identity.
std::unique_ptr<Communicator> make_solo_communicator(at::Device device, Ledger& ledger);
/// Rank 0 of `size` ranks that are not there: what shapes the outline of a split model. Any collective of more than one
/// is an InternalError.
std::unique_ptr<Communicator> make_outline_communicator(int size, Ledger& ledger);

}  // namespace corank
