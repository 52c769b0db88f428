#include "launch/plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <optional>

#include "comm/gradient_sum.h"
#include "configs/error.h"
#include "launch/bytes_table.h"

namespace corank {
namespace {

// Fitted on two of the measured steps, then held against the others (docs/scaling.md).
constexpr double kUncounted = 1.045;     // gaps between kernels, products of a few columns
constexpr double kGradientShare = 0.65;  // of the products' rate: float32 results over long sums

int64_t element_bytes(const RunConfig& run) { return run.model.dtype == at::kFloat ? 4 : 2; }

StepShape step_shape(const RunConfig& run, int data) {
  const int64_t sequences = run.train.micro_batch_size;
  return {.micro_batches = run.train.global_batch_size / (sequences * data),
          .sequences = sequences,
          .seq_len = run.data.seq_len,
          .targets = sequences * (run.data.seq_len - 1),
          .element_bytes = element_bytes(run),
          .checkpointing = run.model.checkpointing};
}

double compute_seconds(const StepWork& work, const DeviceRates& device, bool float32) {
  const double products = 1e12 * (float32 ? device.float32_tflops : device.product_tflops);
  return kUncounted *
         ((work.product_flops + work.gradient_flops / kGradientShare) / products +
          work.attention_flops / (1e12 * device.attention_tflops) + work.bytes / (1e9 * device.memory_gbps));
}

std::vector<StepCollective> collectives_of(const RunConfig& run, const Outline& outline, int data,
                                           const StepShape& step) {
  const std::vector<BatchSize> batches(static_cast<size_t>(step.micro_batches), {step.tokens(), step.targets});
  return predict_step(outline.shape, run.adapter, outline.tensor, data, static_cast<int>(step.element_bytes),
                      step.checkpointing, batches, 1, gradient_sum(run.gradient_sum()));
}

MemoryPlan memory_of_run(const RunConfig& run, const Outline& outline, const AdapterMethod& method,
                         const StepShape& step) {
  MemoryPlan memory = memory_of(outline, method, step);
  memory.gradients += gradient_sum(run.gradient_sum()).kept_bytes * outline.trained_here;
  return memory;
}

std::map<Purpose, double> seconds_by_purpose(const std::vector<StepCollective>& collectives, const Cluster& cluster,
                                             int tensor) {
  std::map<Purpose, double> seconds;
  for (const auto& [purpose, axis, transfer, calls] : collectives) {
    seconds[purpose] += static_cast<double>(calls) * collective_seconds(transfer.collective, transfer.payload_bytes(),
                                                                        place_of(axis, cluster, tensor), cluster);
  }
  return seconds;
}

/// Communication that `compute` seconds of work do not hide.
double exposed_seconds(const std::map<Purpose, double>& seconds, double compute) {
  double exposed = 0;
  for (const auto& [purpose, part] : seconds) {
    exposed += purpose == Purpose::base_gathers ? std::max(0.0, part - compute) : part;
  }
  return exposed;
}

/// Rank 0's.
std::vector<PlannedTraffic> traffic_of(const std::vector<StepCollective>& collectives, const Cluster& cluster,
                                       int tensor) {
  std::vector<int> hosts;
  for (int rank = 0; rank < cluster.ranks; ++rank) hosts.push_back(rank / cluster.ranks_per_host);
  std::map<Axis, Ring> rings;
  for (const Axis axis : {Axis::world, Axis::dp, Axis::tp}) rings[axis] = ring_of(axis, hosts, tensor, 0);
  const Ledger::Snapshot sent = traffic_by_purpose(collectives, [&](Axis axis) { return rings.at(axis); });
  std::map<Purpose, double> seconds = seconds_by_purpose(collectives, cluster, tensor);
  std::vector<PlannedTraffic> traffic;
  for (const Purpose purpose : kStepPurposes) {
    const Traffic& line = sent[static_cast<size_t>(purpose)];
    if (line.payload_bytes == 0) continue;
    traffic.push_back({purpose, line.payload_bytes, line.sent_bytes - line.sent_between_hosts, line.sent_between_hosts,
                       seconds[purpose]});
  }
  return traffic;
}

/// What decides between layouts.
struct Estimate {
  int64_t memory = 0;
  double seconds = 0;
};

Estimate estimate(const RunConfig& run, const Outline& outline, const Cluster& cluster) {
  const auto method = make_method(run.adapter);
  const int data = cluster.ranks / outline.tensor;
  const StepShape step = step_shape(run, data);
  double seconds = compute_seconds(work_of(outline, *method, step), cluster.device, run.model.dtype == at::kFloat);
  seconds +=
      exposed_seconds(seconds_by_purpose(collectives_of(run, outline, data, step), cluster, outline.tensor), seconds);
  return {memory_of_run(run, outline, *method, step).total(), seconds};
}

int64_t available_bytes(const Cluster& cluster) { return static_cast<int64_t>(cluster.device.memory_gib * kGib); }

/// A split of the cluster's ranks that neither cuts hosts unevenly nor the model.
std::optional<Outline> try_split(const RunConfig& run, const Cluster& cluster, int tensor) {
  const int host = std::min(cluster.ranks_per_host, cluster.ranks);
  if (cluster.ranks % tensor != 0 || (host % tensor != 0 && tensor % host != 0)) return std::nullopt;
  try {
    return outline_of(run, tensor, cluster.ranks / tensor);
  } catch (const ConfigError&) {  // heads or features that do not divide
    return std::nullopt;
  }
}

/// Where a base can be; one data-parallel rank has all of it.
std::vector<std::string> shard_bases(int data) {
  return data == 1 ? std::vector<std::string>{"none"} : shard_base_names();
}

/// The quickest way through a step that fits, over one split.
std::optional<Layout> quickest_of_split(const RunConfig& run, const Outline& outline, const Cluster& cluster) {
  const int64_t rows = run.train.global_batch_size / (cluster.ranks / outline.tensor);
  std::optional<Layout> best;
  double seconds = 0;
  for (int64_t micro = 1; micro <= rows; micro *= 2) {
    if (rows % micro != 0) continue;
    for (const Checkpointing kind : {Checkpointing::none, Checkpointing::mlp, Checkpointing::full}) {
      const Layout layout{outline.tensor, micro, kind, run.parallel.shard_base};
      const Estimate one = estimate(with_layout(run, layout), outline, cluster);
      if (one.memory > available_bytes(cluster) || (best && one.seconds >= seconds)) continue;
      best = layout;
      seconds = one.seconds;
    }
  }
  return best;
}

}  // namespace

Layout layout_of(const RunConfig& run) {
  return {static_cast<int>(run.parallel.tensor), run.train.micro_batch_size, run.model.checkpointing,
          run.parallel.shard_base};
}

RunConfig with_layout(RunConfig run, const Layout& layout) {
  run.parallel.tensor = layout.tensor;
  run.parallel.shard_base = layout.shard_base;
  run.train.micro_batch_size = layout.micro_batch_size;
  run.model.checkpointing = layout.checkpointing;
  return run;
}

int64_t Plan::payload() const {
  int64_t bytes = 0;
  for (const PlannedTraffic& line : traffic) bytes += line.payload;
  return bytes;
}

double Plan::communication_seconds() const {
  std::map<Purpose, double> seconds;
  for (const PlannedTraffic& line : traffic) seconds[line.purpose] = line.seconds;
  return exposed_seconds(seconds, compute_seconds);
}

Plan make_plan(const RunConfig& run, const Outline& outline, const Cluster& cluster) {
  const auto method = make_method(run.adapter);
  Plan plan;
  plan.layout = layout_of(run);
  plan.ranks = cluster.ranks;
  plan.data = cluster.ranks / outline.tensor;
  plan.trained = outline.trained;
  plan.all_parameters = outline.base_parameters + (method->trains_base() ? 0 : outline.trained);
  const StepShape step = step_shape(run, plan.data);
  plan.memory = memory_of_run(run, outline, *method, step);
  plan.available = available_bytes(cluster);
  plan.traffic = traffic_of(collectives_of(run, outline, plan.data, step), cluster, outline.tensor);
  plan.compute_seconds =
      compute_seconds(work_of(outline, *method, step), cluster.device, run.model.dtype == at::kFloat);
  plan.tokens = run.train.global_batch_size * run.data.seq_len;
  return plan;
}

std::vector<Plan> quickest_layouts(RunConfig run, const Cluster& cluster) {
  std::vector<Plan> plans;
  for (int tensor = 1; tensor <= cluster.ranks; ++tensor) {
    if (cluster.ranks % tensor != 0 || run.train.global_batch_size % (cluster.ranks / tensor) != 0) continue;
    for (const std::string& shard_base : shard_bases(cluster.ranks / tensor)) {
      run.parallel.shard_base = shard_base;
      const std::optional<Outline> outline = try_split(run, cluster, tensor);
      if (!outline) continue;
      const std::optional<Layout> layout = quickest_of_split(run, *outline, cluster);
      if (layout) plans.push_back(make_plan(with_layout(run, *layout), *outline, cluster));
    }
  }
  std::sort(plans.begin(), plans.end(),
            [](const Plan& a, const Plan& b) { return a.step_seconds() < b.step_seconds(); });
  return plans;
}

std::vector<ScalingPoint> scaling(const RunConfig& run, const Outline& outline, const Outline& full_outline,
                                  const Cluster& cluster) {
  const int64_t rows = run.train.global_batch_size * outline.tensor / cluster.ranks;  // of a data-parallel rank
  const RunConfig full_run = as_full_fine_tuning(run);
  std::vector<ScalingPoint> points;
  for (int ranks = std::max(cluster.ranks_per_host, outline.tensor); ranks <= kMostScaledRanks; ranks *= 2) {
    // What a rank keeps of a sharded base depends on their number.
    const auto at_this_size = [&](const RunConfig& one, const Outline& sizes) {
      return sizes.gathered_bytes > 0 ? outline_of(one, outline.tensor, ranks / outline.tensor) : sizes;
    };
    const Outline here = at_this_size(run, outline), full_here = at_this_size(full_run, full_outline);
    for (const Network& network : networks()) {
      Cluster larger = cluster;
      larger.ranks = ranks;
      larger.between = network.link;
      const auto rate = [&](RunConfig one, const Outline& sizes) {
        one.train.global_batch_size = rows * ranks / outline.tensor;
        return static_cast<double>(rows * run.data.seq_len) / (outline.tensor * estimate(one, sizes, larger).seconds);
      };
      points.push_back({network.name, ranks, rate(run, here), rate(full_run, full_here)});
    }
  }
  return points;
}

}  // namespace corank
