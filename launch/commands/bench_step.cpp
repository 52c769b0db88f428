#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>

#include "launch/bench.h"
#include "launch/checks.h"
#include "launch/commands/commands.h"
#include "launch/console.h"
#include "launch/same_start.h"
#include "trainer/ops/device.h"

namespace corank {
namespace {

struct BenchStepArguments : CommandLine {
  int64_t steps = 20, warmup = 3;
};

/// Multiply-adds of a step count twice. Frozen base: forward and input gradients, 4 P; full: 6 P. Attention: causal
/// halves 4 T D forward, and backward is 2.5 times that (the counting of NVIDIA's LoRA benchmarks).
double model_flops(Session& session, const StepBatches& batches) {
  double linear = 0, width = 0;
  for (const AdaptedLinear* l : session.model().linears()) {
    linear += static_cast<double>(l->site().in * l->site().out);
    if (l->site().role == LinearRole::attention_out) width += static_cast<double>(l->site().in);
  }
  const double head = static_cast<double>(session.model().vocab_size() * session.model().hidden_size());
  const double passes = session.method().trains_base() ? 6 : 4;
  double flops = 0;
  for (const Batch& batch : batches.micro_batches) {
    flops +=
        passes * (linear * static_cast<double>(batch.num_tokens()) + head * static_cast<double>(batch.num_targets()));
    for (const int64_t length : batch.lengths) flops += 3.5 * 2 * width * static_cast<double>(length * length);
  }
  return flops * session.mesh().dp().size();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

int run_bench_step(const BenchStepArguments& a, const World& world) {
  const RunConfig run = read_same_run(a.run_file, a.overrides, world);
  const int threads = share_cores(world, run.one_thread());
  check_together(check_bench, check_bench, run, world);
  Session session(run, world);
  if (session.leader()) Console(session, a.json).introduce(start_record(session, world, threads));
  Bench bench(session);
  const at::Device device = session.mesh().device();
  std::vector<double> seconds, rates;
  StepStats stats;
  double flops = 0;
  for (int64_t step = 1; step <= a.warmup + a.steps; ++step) {
    if (step == a.warmup + 1) reset_peak_memory(device);
    const StepBatches batches = bench.next();
    synchronize(device);
    const auto start = std::chrono::steady_clock::now();
    stats = bench.step(batches, step);
    synchronize(device);
    if (step <= a.warmup) continue;
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    rates.push_back(static_cast<double>(stats.tokens) / seconds.back());
    flops = model_flops(session, batches);
  }
  if (!session.leader()) return 0;
  const double middle = median(seconds);
  const auto [low, high] = std::minmax_element(seconds.begin(), seconds.end());
  const nlohmann::ordered_json result{{"tokens_per_second", median(rates)},
                                      {"step_seconds", {{"median", middle}, {"min", *low}, {"max", *high}}},
                                      {"peak_memory_bytes", peak_memory_bytes(device)},
                                      {"model_tflops", flops / middle / 1e12},
                                      {"final_loss", stats.loss}};
  if (a.json) {
    fmt::print("{}\n", result.dump());
  } else {
    fmt::print(
        "{:.0f} tokens/s, step {:.4f} s (min {:.4f}, max {:.4f}, {} steps), {:.2f} model TFLOP/s, peak memory {}, loss "
        "{:.4f}\n",
        median(rates), middle, *low, *high, a.steps, flops / middle / 1e12, human_bytes(peak_memory_bytes(device)),
        stats.loss);
  }
  return 0;
}

}  // namespace

CommandWork declare_bench_step(CLI::App& app) {
  auto a = std::make_shared<BenchStepArguments>();
  add_run_options(app, *a);
  app.add_option("--steps", a->steps, "timed steps")->check(CLI::Range(1, 100000));
  app.add_option("--warmup", a->warmup, "steps before them")->check(CLI::Range(0, 1000));
  return [a](const World* world, Storage&) { return run_bench_step(*a, *world); };
}

}  // namespace corank
