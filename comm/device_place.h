#pragma once
#include <string>
#include <vector>

namespace corank {

/// Where the GPU of a rank is.
struct DevicePlace {
  std::string host;
  std::string uuid;  ///< empty where the host shows no device for this rank
};

/// `places` by rank. Throws ConfigError, naming the ranks, if one has no GPU or two share one.
void require_own_devices(const std::vector<DevicePlace>& places);

}  // namespace corank
