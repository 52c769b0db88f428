#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "comm/mesh.h"

namespace corank {

inline constexpr double kGib = 1024.0 * 1024 * 1024;

/// What joins ranks.
struct LinkRates {
  double gbps = 0;        ///< 1e9 bytes a second: inside a host a rank's, between hosts a host's
  double latency_us = 0;  ///< of one hop of a short message
};

/// What one rank computes on: sustained rates, not peaks. docs/scaling.md says where each is from.
struct DeviceRates {
  std::string_view name;
  double product_tflops = 0;    ///< matrix products of a layer's sizes, bfloat16
  double float32_tflops = 0;    ///< the same in float32
  double attention_tflops = 0;  ///< forward and backward together
  double memory_gbps = 0;       ///< read and written
  double memory_gib = 0;        ///< that a program can have
  LinkRates link;               ///< to the other devices of the host
};

std::vector<std::string> device_names();
/// The name in the table of the GPU that the driver says this host has; empty: none, or another.
std::string gpu_of_host();
/// ConfigError that lists the known ones if there is none of this name. "cpu" is measured, in a tenth of a second.
DeviceRates device_rates(const std::string& name);

/// Of `gbits` a second by name, what messages get: 47 of 50 GB/s were measured on 400 Gbit/s (docs/scaling.md).
inline double bandwidth_of(double gbits) { return 0.94 * gbits / 8; }

/// Between hosts where nobody says: one 400 Gbit/s InfiniBand port.
inline constexpr double kUsualGbits = 400, kUsualLatencyUs = 2.7;

/// Links between hosts that scaling is shown for.
struct Network {
  std::string name;
  LinkRates link;
};
const std::vector<Network>& networks();

struct Cluster {
  DeviceRates device;
  int ranks = 1, ranks_per_host = 1;
  LinkRates between;  ///< hosts
};

/// Where the ranks of one group are; as many on each of its hosts.
struct GroupPlace {
  int size = 1;
  int on_host = 1;       ///< of them on one host
  int sharing_host = 1;  ///< groups of the axis that use a host's link at the same time

  int hosts() const { return size / on_host; }
};
GroupPlace place_of(Axis axis, const Cluster& cluster, int tensor);

/// One collective, by NCCL's cost model: a start, a latency for each hop in turn, bytes at the slowest link's rate; the
/// quicker of ring and tree, of a protocol for short and one for long messages. 0 in a group of one.
double collective_seconds(Collective collective, int64_t payload, const GroupPlace& place, const Cluster& cluster);

}  // namespace corank
