#pragma once
#include <string>
#include <vector>

namespace corank {

/// The GPUs that a rank sees.
struct VisibleDevices {
  std::string host;                ///< for messages
  std::vector<std::string> uuids;  ///< in the order of its CUDA devices
};

/// The CUDA device of each rank: its place among the ranks that see the same devices in the same order. Where all ranks
/// of a host see all of its GPUs that is the local rank; where each sees one of its own, as Slurm's --gpus-per-task
/// makes it, device 0. `ranks` by rank. Throws ConfigError, naming the ranks, if one is left without a GPU or two would
/// share one.
std::vector<int> place_on_devices(const std::vector<VisibleDevices>& ranks);

}  // namespace corank
