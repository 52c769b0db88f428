#include "comm/device_place.h"

#include <map>

#include "configs/error.h"

namespace corank {
namespace {

const char* const kRemedy =
    "NCCL needs a GPU for each rank: start at most as many ranks on a host as it shows GPUs, or set parallel.backend "
    "to "
    "mpi.";

}  // namespace

void require_own_devices(const std::vector<DevicePlace>& places) {
  std::map<std::string, size_t> owners;
  for (size_t rank = 0; rank < places.size(); ++rank) {
    const DevicePlace& place = places[rank];
    if (place.uuid.empty()) {
      throw ConfigError("Rank " + std::to_string(rank) + " has no GPU on host " + place.host + ". " + kRemedy);
    }
    const auto [owner, first] = owners.emplace(place.uuid, rank);
    if (!first) {
      throw ConfigError("Ranks " + std::to_string(owner->second) + " and " + std::to_string(rank) + " share GPU " +
                        place.uuid + " of host " + place.host + ". " + kRemedy);
    }
  }
}

}  // namespace corank
