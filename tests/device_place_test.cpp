#include "comm/device_place.h"

#include <gtest/gtest.h>

#include "configs/error.h"

namespace corank {
namespace {

std::string refusal(const std::vector<DevicePlace>& places) {
  try {
    require_own_devices(places);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "";
}

TEST(DevicePlace, AcceptsAGpuForEachRank) {
  EXPECT_EQ(refusal({{"a", "GPU-1"}, {"a", "GPU-2"}, {"b", "GPU-3"}, {"b", "GPU-4"}}), "");
}

TEST(DevicePlace, NamesTheRanksThatShareAGpu) {
  const std::string text = refusal({{"a", "GPU-1"}, {"a", "GPU-2"}, {"a", "GPU-1"}});
  EXPECT_NE(text.find("Ranks 0 and 2 share GPU GPU-1 of host a"), std::string::npos) << text;
}

TEST(DevicePlace, NamesTheRankWithoutAGpu) {
  const std::string text = refusal({{"a", "GPU-1"}, {"b", ""}});
  EXPECT_NE(text.find("Rank 1 has no GPU on host b"), std::string::npos) << text;
}

}  // namespace
}  // namespace corank
