#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "configs/text.h"
#include "launch/checks.h"
#include "launch/commands/commands.h"
#include "launch/plan_text.h"
#include "launch/plot.h"

namespace corank {
namespace {

constexpr int kMostRanksOfHost = 8;  // where nobody says how many
constexpr double kMostRate = 1e6;

struct PlanArguments : CommandLine {
  int ranks = 0, ranks_per_host = 0;
  std::string device = "h100", plot_file;
  std::optional<double> memory_gib, tflops, link_gbps, latency_us;
};

Cluster cluster_of(const PlanArguments& a, int ranks) {
  Cluster cluster;
  cluster.device = device_rates(a.device);
  cluster.ranks = ranks;
  cluster.ranks_per_host = a.ranks_per_host > 0 ? a.ranks_per_host : std::min(ranks, kMostRanksOfHost);
  cluster.between = {bandwidth_of(a.link_gbps.value_or(kUsualGbits)), a.latency_us.value_or(kUsualLatencyUs)};
  if (a.memory_gib) cluster.device.memory_gib = *a.memory_gib;
  if (a.tflops) cluster.device.product_tflops = cluster.device.float32_tflops = *a.tflops;
  return cluster;
}

/// A layout of which every host holds as much as the others.
void check_hosts(const Cluster& cluster, int tensor) {
  const int host = cluster.ranks_per_host;
  if (cluster.ranks > host && cluster.ranks % host != 0) {
    throw ConfigError(fmt::format("--ranks-per-host: {} does not divide the {} ranks.", host, cluster.ranks));
  }
  if (std::min(host, cluster.ranks) % tensor != 0 && tensor % host != 0) {
    throw ConfigError(
        fmt::format("--ranks-per-host: hosts of {} ranks cut tensor-parallel groups of {} unevenly. Choose a multiple "
                    "or a divisor.",
                    host, tensor));
  }
}

PlanReport report_of(const RunConfig& run, const RunConfig& full_run, const Outline& outline,
                     const Outline& full_outline, const Cluster& cluster) {
  PlanReport report;
  report.run_file = run.file;
  report.method = run.adapter.method;
  report.model = run.model.path.empty() ? run.model.shape : run.model.path;
  report.quantization = run.model.quantization;
  report.global_batch_size = run.train.global_batch_size;
  report.cluster = cluster;
  report.run = make_plan(run, outline, cluster);
  report.full = make_plan(full_run, full_outline, cluster);
  report.layouts = quickest_layouts(run, cluster);
  report.full_layouts = quickest_layouts(full_run, cluster);
  return report;
}

int run_plan(const PlanArguments& a, Storage& storage) {
  RunConfig run = read_run(a.run_file, a.overrides);
  const int tensor = static_cast<int>(run.parallel.tensor), ranks = a.ranks > 0 ? a.ranks : tensor;
  const Cluster cluster = cluster_of(a, ranks);
  check_hosts(cluster, tensor);
  run.adapter = check_plan(run, ranks).adapter;
  const RunConfig full_run = as_full_fine_tuning(run);
  const Outline outline = outline_of(run, tensor, ranks / tensor);
  const Outline full_outline = outline_of(full_run, tensor, ranks / tensor);
  const PlanReport report = report_of(run, full_run, outline, full_outline, cluster);
  nlohmann::ordered_json answer = plan_json(report);
  if (a.json || !a.plot_file.empty()) {
    answer["scaling"] = scaling_json(scaling(run, outline, full_outline, cluster));
  }
  if (!a.plot_file.empty()) plot(storage, "plan", answer.dump(), a.plot_file);
  fmt::print("{}\n", a.json ? answer.dump() : printable_lines(plan_text(report)));
  return 0;
}

}  // namespace

CommandWork declare_plan(CLI::App& app) {
  auto a = std::make_shared<PlanArguments>();
  add_run_options(app, *a);
  app.add_option("--ranks", a->ranks, "number of ranks (default: parallel.tensor)")->check(CLI::Range(1, 1 << 16));
  app.add_option("--ranks-per-host", a->ranks_per_host, "of them on one host (default: 8, or all where they are fewer)")
      ->check(CLI::Range(1, 1 << 16));
  app.add_option(
      "--device", a->device,
      fmt::format("what a rank computes on: {} (default: h100; cpu is measured)", fmt::join(device_names(), ", ")));
  const auto rate = CLI::Range(1e-6, kMostRate);
  app.add_option("--memory-gib", a->memory_gib, "of a device")->check(rate);
  app.add_option("--tflops", a->tflops, "sustained rate of matrix products, measured")->check(rate);
  app.add_option("--link-gbps", a->link_gbps, "Gbit/s between hosts, of all links of a host (default: 400)")
      ->check(rate);
  app.add_option("--latency-us", a->latency_us, "of one hop of a short message between hosts (default: 2.7)")
      ->check(rate);
  app.add_option("--plot", a->plot_file, "draws memory and scaling into this file (.png, .svg, .pdf)");
  return [a](const World*, Storage& storage) { return run_plan(*a, storage); };
}

}  // namespace corank
