#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "comm/ledger.h"

namespace corank {

/// What one rank computes on, as a plan takes it: sustained rates, not peaks. docs/scaling.md says where each is from.
struct DeviceRates {
  std::string name;
  double product_tflops = 0;     ///< matrix products of a layer's sizes
  double attention_tflops = 0;   ///< forward and backward together
  double memory_gbps = 0;        ///< read and written, 1e9 bytes a second
  double memory_gib = 0;         ///< that a program can have
  double bus_gbps = 0;           ///< of a ring inside a host, a rank
};

/// The named devices of the table.
std::vector<std::string> device_names();
/// ConfigError that lists the known ones if there is none of this name; "cpu" is measured here, in a tenth of a second.
DeviceRates device_rates(const std::string& name, bool bfloat16);

/// What joins ranks. A collective over several hosts is as fast as the slower of both.
struct Link {
  double gbps = 0;        ///< 1e9 bytes a second, inside a host a rank's, between hosts a host's
  double latency_us = 0;  ///< of one hop
};

struct Cluster {
  DeviceRates device;
  int ranks = 1, ranks_per_host = 1;
  Link inside, between;
};

/// Ranks of one group and where they are: every group of its axis has as many on each host.
struct GroupPlace {
  int size = 1;
  int on_host = 1;      ///< of them on one host
  int sharing_host = 1; ///< groups of the axis that use a host's link at the same time

  int hosts() const { return size / on_host; }
};
GroupPlace place_of_tensor_group(const Cluster& cluster, int tensor);
GroupPlace place_of_data_group(const Cluster& cluster, int tensor);
GroupPlace place_of_world(const Cluster& cluster);

/// One collective, by NCCL's cost model (src/graph/tuning.cc): a start, a latency for each hop in turn, bytes at the
/// slowest link's rate; the faster of ring and tree, of its protocols for short and for long messages. 0 in a group of one.
double collective_seconds(Collective collective, int64_t payload, const GroupPlace& place, const Cluster& cluster);

}  // namespace corank
