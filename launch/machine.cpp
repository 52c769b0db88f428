#include "launch/machine.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "configs/error.h"

namespace corank {
namespace {

// H200: measured by tests of the floor on an 8B shape and by copies; attention at 2,048 positions and 128 features a
// head. H100: its products and attention ran as fast; memory, and all of A100, are the vendor's figures times the share
// of them that the H200 reached. docs/scaling.md has the list.
constexpr DeviceRates kDevices[] = {
    {.name = "h100",
     .product_tflops = 683,
     .float32_tflops = 46,
     .attention_tflops = 396,
     .memory_gbps = 2875,
     .memory_gib = 79.1,
     .link = {.gbps = 305, .latency_us = 0.6}},
    {.name = "h200",
     .product_tflops = 683,
     .float32_tflops = 46,
     .attention_tflops = 396,
     .memory_gbps = 4120,
     .memory_gib = 139.8,
     .link = {.gbps = 305, .latency_us = 0.6}},
    {.name = "a100",
     .product_tflops = 215,
     .float32_tflops = 13,
     .attention_tflops = 125,
     .memory_gbps = 1750,
     .memory_gib = 79.1,
     .link = {.gbps = 203, .latency_us = 0.6}},
};
constexpr const char* kCpu = "cpu";

/// The best of several runs of `work`, in seconds.
template <class Work>
double best_seconds(Work work) {
  double best = 1e30;
  for (int i = 0; i < 4; ++i) {
    const auto start = std::chrono::steady_clock::now();
    work();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

double measured_tflops(at::ScalarType dtype) {
  constexpr int64_t kSize = 512;
  const at::Tensor a = at::ones({kSize, kSize}, dtype), b = at::ones({kSize, kSize}, dtype);
  return 2.0 * kSize * kSize * kSize / best_seconds([&] { at::mm(a, b); }) / 1e12;
}

/// Copies read and write.
double measured_gbps() {
  const at::Tensor from = at::ones({int64_t{1} << 24}, at::kByte), to = at::empty_like(from);
  return 2.0 * static_cast<double>(from.nbytes()) / best_seconds([&] { to.copy_(from); }) / 1e9;
}

/// One rank of this process's threads. A ring of MPI ranks on two cores passes 2 GB a second (README, "Bytes").
DeviceRates measured_cpu() {
  DeviceRates cpu;
  cpu.name = kCpu;
  cpu.float32_tflops = measured_tflops(at::kFloat);
  cpu.product_tflops = measured_tflops(at::kBFloat16);
  cpu.attention_tflops = cpu.float32_tflops;
  cpu.memory_gbps = measured_gbps();
  cpu.memory_gib = static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGE_SIZE)) / kGib;
  cpu.link = {.gbps = 2, .latency_us = 5};
  return cpu;
}

// NCCL 2.30's constants for Hopper (src/graph/tuning.cc): of its protocols the shortest (LL) and the fastest (Simple).
struct Protocol {
  double start_us, hops;  ///< `hops`: latency of one as a multiple of a link's
  double share;           ///< of the bandwidth
  double most_gbps;       ///< inside a host
};
constexpr Protocol kProtocols[] = {
    {.start_us = 6.6, .hops = 1, .share = 0.5, .most_gbps = 141},
    {.start_us = 8.4, .hops = 5.5, .share = 1, .most_gbps = 1e9},
};
constexpr double kTreeShare = 0.92;

/// Hops in turn that a collective makes, by link.
struct Hops {
  double inside = 0, between = 0;
};

Hops ring_hops(const GroupPlace& place, int rounds) {
  const int between = place.hosts() - 1;
  return {static_cast<double>(rounds * (place.size - 1 - between)), static_cast<double>(rounds * between)};
}

Hops tree_hops(const GroupPlace& place) {
  return {2.0 * (place.on_host - 1), 2 * std::ceil(std::log2(static_cast<double>(place.hosts())))};
}

/// Bytes that a rank sends in a ring.
double ring_payload(Collective collective, double payload, double size) {
  switch (collective) {
    case Collective::all_reduce:
      return 2 * payload * (size - 1) / size;
    case Collective::reduce_scatter:
      return payload * (size - 1) / size;
    case Collective::all_gather:
      return payload * (size - 1);
    case Collective::broadcast:
      return payload;
    case Collective::barrier:
    case Collective::split:
      return 0;
  }
  return 0;
}

}  // namespace

std::vector<std::string> device_names() {
  std::vector<std::string> names;
  for (const DeviceRates& device : kDevices) names.emplace_back(device.name);
  names.emplace_back(kCpu);
  return names;
}

std::string gpu_of_host() {
  const std::filesystem::path folder = "/proc/driver/nvidia/gpus";
  std::error_code none;
  for (const auto& gpu : std::filesystem::directory_iterator(folder, none)) {
    std::ifstream file(gpu.path() / "information");
    std::string text((std::istreambuf_iterator<char>(file)), {});
    for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    for (const DeviceRates& device : kDevices) {
      if (text.find(device.name) != std::string::npos) return std::string(device.name);
    }
  }
  return "";
}

DeviceRates device_rates(const std::string& name) {
  for (const DeviceRates& device : kDevices) {
    if (name == device.name) return device;
  }
  if (name == kCpu) return measured_cpu();
  throw ConfigError(fmt::format("--device: '{}' is not one of {}", name, fmt::join(device_names(), ", ")));
}

const std::vector<Network>& networks() {
  static const std::vector<Network> table{{"1 Gbit/s Ethernet", {bandwidth_of(1), 30}},
                                          {"10 Gbit/s Ethernet", {bandwidth_of(10), 30}},
                                          {"100 Gbit/s Ethernet", {bandwidth_of(100), 10}},
                                          {"400 Gbit/s InfiniBand", {bandwidth_of(400), 2.7}},
                                          {"8 x 400 Gbit/s InfiniBand", {bandwidth_of(8 * 400), 2.7}}};
  return table;
}

GroupPlace place_of(Axis axis, const Cluster& cluster, int tensor) {
  const int ranks = cluster.ranks, host = std::min(cluster.ranks_per_host, ranks);
  switch (axis) {
    case Axis::tp:
      return {tensor, std::min(tensor, host), 1};
    case Axis::dp:
      return {ranks / tensor, std::max(1, host / tensor), std::min(tensor, host)};
    case Axis::world:
      return {ranks, host, 1};
  }
  return {};
}

double collective_seconds(Collective collective, int64_t payload, const GroupPlace& place, const Cluster& cluster) {
  if (place.size <= 1) return 0;
  const bool spans = place.hosts() > 1, sums = collective == Collective::all_reduce;
  const double bytes = ring_payload(collective, static_cast<double>(payload), place.size);
  const double between = cluster.between.gbps / place.sharing_host;
  double best = 1e30;
  for (const Protocol& protocol : kProtocols) {
    const double inside = std::min(cluster.device.link.gbps * protocol.share, protocol.most_gbps);
    const double gbps = spans ? std::min(inside, between * protocol.share) : inside;
    const auto seconds = [&](const Hops& hops, double share) {
      const double us = hops.inside * cluster.device.link.latency_us + hops.between * cluster.between.latency_us;
      return 1e-6 * (protocol.start_us + protocol.hops * us) + bytes / (share * gbps * 1e9);
    };
    best = std::min(best, seconds(ring_hops(place, sums ? 2 : 1), 1));
    if (sums && spans) best = std::min(best, seconds(tree_hops(place), kTreeShare));
  }
  return best;
}

}  // namespace corank
