#include "comm/device_place.h"

#include <gtest/gtest.h>

#include "configs/error.h"

namespace corank {
namespace {

using Devices = std::vector<int>;

std::string refusal(const std::vector<VisibleDevices>& ranks) {
  try {
    place_on_devices(ranks);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "";
}

TEST(DevicePlace, IsTheLocalRankWhereAllRanksSeeAllGpusOfTheirHost) {
  const VisibleDevices a{"a", {"GPU-1", "GPU-2"}}, b{"b", {"GPU-3", "GPU-4"}};
  EXPECT_EQ(place_on_devices({a, a, b, b}), (Devices{0, 1, 0, 1}));
  EXPECT_EQ(place_on_devices({a, b, a, b}), (Devices{0, 0, 1, 1}));  // ranks dealt host by host
}

TEST(DevicePlace, IsTheOnlyGpuThatARankSees) {
  EXPECT_EQ(place_on_devices({{"a", {"GPU-1"}}, {"a", {"GPU-2"}}, {"b", {"GPU-3"}}}), (Devices{0, 0, 0}));
}

TEST(DevicePlace, CountsAmongRanksThatSeeTheSameGpus) {
  const VisibleDevices near{"a", {"GPU-1", "GPU-2"}}, far{"a", {"GPU-3", "GPU-4"}};
  EXPECT_EQ(place_on_devices({near, near, far, far}), (Devices{0, 1, 0, 1}));
  EXPECT_EQ(place_on_devices({{"a", {"GPU-1", "GPU-2"}}, {"a", {"GPU-2", "GPU-1"}}}), (Devices{0, 0}));
}

TEST(DevicePlace, NamesTheRanksThatShareAGpu) {
  const std::string text = refusal({{"a", {"GPU-1", "GPU-2"}}, {"a", {"GPU-2"}}, {"a", {"GPU-1"}}});
  EXPECT_NE(text.find("Ranks 0 and 2 share GPU GPU-1 of host a"), std::string::npos) << text;
}

TEST(DevicePlace, NamesTheRankWithoutAGpu) {
  const std::string none = refusal({{"a", {"GPU-1"}}, {"b", {}}});
  EXPECT_NE(none.find("Rank 1 has no GPU of its own on host b, which shows it 0"), std::string::npos) << none;
  const std::string taken = refusal({{"a", {"GPU-1"}}, {"a", {"GPU-1"}}});
  EXPECT_NE(taken.find("Rank 1 has no GPU of its own on host a, which shows it 1"), std::string::npos) << taken;
}

}  // namespace
}  // namespace corank
