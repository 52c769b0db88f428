#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "launch/bench.h"
#include "launch/bytes_table.h"
#include "launch/checks.h"
#include "launch/commands/commands.h"
#include "launch/console.h"

namespace corank {
namespace {

struct Line {
  int64_t predicted = 0, counted = 0;
  double seconds = 0;
};
using Report = std::map<Purpose, Line>;

/// One step as the run file says, its bytes predicted before it and counted during it.
Report measure(const RunConfig& run, const World& world) {
  Session session(run, world);
  Bench bench(session);
  session.ledger().set_timing(true);
  const StepBatches batches = bench.next();
  std::vector<BatchSize> sizes;
  for (const Batch& batch : batches.micro_batches) sizes.push_back({batch.num_tokens(), batch.num_targets()});
  const auto predicted = predicted_bytes(session, session.run().adapter, sizes);
  const Ledger::Snapshot before = session.ledger().snapshot();
  bench.step(batches, 1);
  Report report;
  for (const Purpose purpose : kStepPurposes) {
    const auto i = static_cast<size_t>(purpose);
    const Traffic traffic = session.ledger().snapshot()[i] - before[i];
    const auto found = predicted.find(purpose);
    const Line line{found == predicted.end() ? 0 : found->second, traffic.payload_bytes, traffic.seconds};
    if (line.predicted || line.counted) report[purpose] = line;
  }
  return report;
}

int64_t counted_total(const Report& report) {
  int64_t sum = 0;
  for (const auto& entry : report) sum += entry.second.counted;
  return sum;
}

nlohmann::ordered_json to_json(const Report& report) {
  auto result = nlohmann::ordered_json::object();
  for (const auto& [purpose, line] : report) {
    result[std::string(name(purpose))] = {
        {"predicted", line.predicted}, {"counted", line.counted}, {"seconds", line.seconds}};
  }
  return result;
}

void print_report(const char* title, const Report& report) {
  fmt::print("{}\n  {:<20} {:>16} {:>16} {:>7} {:>10}\n", title, "bytes a step", "predicted", "counted", "", "seconds");
  for (const auto& [purpose, line] : report) {
    fmt::print("  {:<20} {:>16} {:>16} {:>7} {:>10.4f}\n", name(purpose), grouped(line.predicted),
               grouped(line.counted), line.predicted == line.counted ? "equal" : "DIFFER", line.seconds);
  }
}

bool all_equal(const Report& report) {
  return std::all_of(report.begin(), report.end(),
                     [](const auto& entry) { return entry.second.predicted == entry.second.counted; });
}

int run_bench_comm(const CommandLine& line, const World& world) {
  const RunConfig run = read_run(line.run_file, line.overrides);
  share_cores(world, run.one_thread());
  check_together(check_bench, run, world);
  RunConfig full_run = run;
  full_run.adapter = {};
  full_run.adapter.method = "full";
  full_run.adapter_keys.clear();
  full_run.train.reproducible = false;
  full_run.model.quantization = "none";  // the bytes sent do not depend on it, and only dense weights train
  const Report adapter = measure(run, world), full = measure(full_run, world);
  if (world.rank() != 0) return 0;
  const double ratio = counted_total(adapter) > 0
                           ? static_cast<double>(counted_total(full)) / static_cast<double>(counted_total(adapter))
                           : 1;
  if (line.json) {
    fmt::print("{}\n",
               nlohmann::ordered_json{{"adapter", to_json(adapter)}, {"full", to_json(full)}, {"ratio", ratio}}.dump());
  } else {
    print_report(("this run (" + run.adapter.method + "), rank 0").c_str(), adapter);
    print_report("full fine-tuning, same layout, rank 0", full);
    fmt::print("{}\n", world.size() == 1 ? "one rank sends nothing: start more of them with mpirun"
                                         : fmt::format("full fine-tuning hands over {:.2f} times the bytes", ratio));
  }
  if (!all_equal(adapter) || !all_equal(full))
    throw InternalError("bench comm: predicted and counted bytes differ (see above).");
  return 0;
}

}  // namespace

CommandWork declare_bench_comm(CLI::App& app) {
  auto line = std::make_shared<CommandLine>();
  add_run_options(app, *line);
  return [line](const World* world, Storage&) { return run_bench_comm(*line, *world); };
}

}  // namespace corank
