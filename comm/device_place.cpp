#include "comm/device_place.h"

#include <fmt/format.h>

#include <map>

#include "configs/error.h"

namespace corank {
namespace {

const char* const kRemedy =
    "NCCL needs a GPU for each rank: start at most as many ranks on a host as it shows GPUs, give each task other GPUs "
    "(CUDA_VISIBLE_DEVICES, Slurm's --gpus-per-task), or set parallel.backend to mpi.";

}  // namespace

std::vector<int> place_on_devices(const std::vector<VisibleDevices>& ranks) {
  std::map<std::vector<std::string>, int> taken;  // of each list of devices
  std::map<std::string, size_t> owners;
  std::vector<int> devices;
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    const auto& [host, uuids] = ranks[rank];
    const auto device = static_cast<size_t>(taken[uuids]++);
    if (device >= uuids.size()) {
      throw ConfigError(fmt::format("Rank {} has no GPU of its own on host {}, which shows it {}. {}", rank, host,
                                    uuids.size(), kRemedy));
    }
    const auto [owner, first] = owners.emplace(uuids[device], rank);
    if (!first) {
      throw ConfigError(fmt::format("Ranks {} and {} share GPU {} of host {}. {}", owner->second, rank, uuids[device],
                                    host, kRemedy));
    }
    devices.push_back(static_cast<int>(device));
  }
  return devices;
}

}  // namespace corank
