#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "comm/agree.h"
#include "launch/bench.h"
#include "launch/bytes_table.h"
#include "launch/checks.h"
#include "launch/commands/commands.h"
#include "launch/console.h"
#include "launch/same_start.h"

namespace corank {
namespace {

struct BytePair {
  int64_t predicted = 0, counted = 0;
  bool equal() const { return predicted == counted; }
};

struct Line {
  BytePair payload;                            ///< of rank 0
  double seconds = 0;                          ///< of rank 0
  std::array<BytePair, kLinks.size()> sent{};  ///< of all ranks together, by link
};
using Report = std::map<Purpose, Line>;

Report report_of(const Mesh& mesh, const Ledger::Snapshot& predicted, const Ledger::Snapshot& counted) {
  const Ledger::Snapshot all_predicted = sum_over_ranks(mesh.world(), predicted);
  const Ledger::Snapshot all_counted = sum_over_ranks(mesh.world(), counted);
  Report report;
  for (const Purpose purpose : kStepPurposes) {
    const auto i = static_cast<size_t>(purpose);
    Line line{{predicted[i].payload_bytes, counted[i].payload_bytes}, counted[i].seconds};
    for (const Link link : kLinks) {
      line.sent[static_cast<size_t>(link)] = {all_predicted[i].over(link).sent, all_counted[i].over(link).sent};
    }
    if (line.payload.predicted || line.payload.counted) report[purpose] = line;
  }
  return report;
}

/// One step as the run file says, its bytes predicted before it and counted during it.
Report measure(const RunConfig& run, const World& world) {
  Session session(run, world);
  const Mesh& mesh = session.mesh();
  Bench bench(session);
  session.ledger().set_timing(true);
  const StepBatches batches = bench.next();
  std::vector<BatchSize> sizes;
  for (const Batch& batch : batches.micro_batches) sizes.push_back({batch.num_tokens(), batch.num_targets()});
  const Ledger::Snapshot predicted = traffic_by_purpose(predicted_step(session, session.run().adapter, sizes),
                                                        [&](Axis axis) { return mesh.group(axis).ring(); });
  const Ledger::Snapshot before = session.ledger().snapshot();
  bench.step(batches, 1);
  Ledger::Snapshot counted = session.ledger().snapshot();
  for (int p = 0; p < kNumPurposes; ++p) counted[p] = counted[p] - before[p];
  return report_of(mesh, predicted, counted);
}

/// Sent by all ranks for all purposes.
BytePair sent_over(const Report& report, Link link) {
  BytePair all;
  for (const auto& entry : report) {
    all.predicted += entry.second.sent[static_cast<size_t>(link)].predicted;
    all.counted += entry.second.sent[static_cast<size_t>(link)].counted;
  }
  return all;
}

int64_t counted_total(const Report& report) {
  int64_t sum = 0;
  for (const auto& entry : report) sum += entry.second.payload.counted;
  return sum;
}

nlohmann::ordered_json to_json(const Report& report) {
  auto result = nlohmann::ordered_json::object();
  for (const auto& [purpose, line] : report) {
    nlohmann::ordered_json& part = result[std::string(name(purpose))];
    part = {{"predicted", line.payload.predicted}, {"counted", line.payload.counted}, {"seconds", line.seconds}};
    for (const Link link : kLinks) {
      const BytePair& sent = line.sent[static_cast<size_t>(link)];
      part["sent"][std::string(name(link))] = {{"predicted", sent.predicted}, {"counted", sent.counted}};
    }
  }
  return result;
}

std::string pair_text(std::string_view what, const BytePair& pair) {
  return fmt::format("  {:<20} {:>16} {:>16} {:>7}", what, grouped(pair.predicted), grouped(pair.counted),
                     pair.equal() ? "equal" : "DIFFER");
}

void print_report(const char* title, const Report& report) {
  fmt::print("{}\n  {:<20} {:>16} {:>16} {:>7} {:>10}\n", title, "bytes a step", "predicted", "counted", "", "seconds");
  for (const auto& [purpose, line] : report) {
    fmt::print("{} {:>10.4f}\n", pair_text(name(purpose), line.payload), line.seconds);
  }
  fmt::print("  sent by all ranks\n");
  for (const Link link : kLinks) fmt::print("{}\n", pair_text(name(link), sent_over(report, link)));
}

bool all_equal(const Report& report) {
  return std::all_of(report.begin(), report.end(), [](const auto& entry) {
    const Line& line = entry.second;
    return line.payload.equal() &&
           std::all_of(line.sent.begin(), line.sent.end(), [](const BytePair& p) { return p.equal(); });
  });
}

int run_bench_comm(const CommandLine& line, const World& world) {
  const RunConfig run = read_same_run(line.run_file, line.overrides, world);
  share_cores(world, run.one_thread());
  check_together(check_bench, check_bench, run, world);
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
