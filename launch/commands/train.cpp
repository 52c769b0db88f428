#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "comm/agree.h"
#include "data/file.h"
#include "launch/bytes_table.h"
#include "launch/checks.h"
#include "launch/commands/commands.h"
#include "launch/console.h"
#include "launch/results.h"
#include "launch/session.h"
#include "trainer/ops/device.h"
#include "trainer/run/trainer.h"

namespace corank {
namespace {

/// The checkpoint that `resume` asks for, or step 0.
TrainingState resumed(Checkpoints& checkpoints, const RunConfig& run, Console& console) {
  if (run.resume == "never") return {};
  const auto path = run.resume == "auto" ? checkpoints.newest() : std::optional(run.resume);
  for (const std::string& damaged : checkpoints.passed_over()) console.say("passed over " + damaged);
  if (!path && !checkpoints.passed_over().empty()) console.say("no checkpoint was ever completed: starting at step 0");
  if (!path) return {};
  const TrainingState state = checkpoints.load(*path);
  console.say(fmt::format("resuming from {} after step {}", *path, state.step));
  return state;
}

/// Where to start. What lies ahead of it in output_dir is no longer the run's.
TrainingState starting_point(Checkpoints& checkpoints, const RunConfig& run, Console& console) {
  const TrainingState start = resumed(checkpoints, run, console);
  for (const std::string& line : checkpoints.start_at(start.step)) console.say(line);
  return start;
}

/// The checkpoints that a run keeps.
Retention retention_of(const RunConfig& run) {
  const bool names_one = run.resume != "auto" && run.resume != "never";
  return {run.save_total_limit, names_one ? run.resume : ""};
}

/// Claims output_dir for this run: refuses one that holds another run or that another process is using, removes what an
/// interrupted write left, and leaves run.yaml.
std::unique_ptr<FolderLock> claim_output(const RunConfig& run, const RunIdentity& identity) {
  check_output(run, identity);
  make_folders(run.output_dir);
  auto lock = std::make_unique<FolderLock>(run.output_dir);
  remove_leftovers(run.output_dir);
  write_file_atomically(run.output_dir + "/run.yaml", identity_line(identity) + run.yaml());
  return lock;
}

struct Outcome {
  TrainingState start, state;
  int64_t total = 0;
  std::map<Purpose, int64_t> bytes_per_step;  ///< counted on this rank, mean of this start's steps; empty without one
};

Outcome train(Session& session, const TokenFile& data, const World& world, Console& console, int threads) {
  const RunConfig& run = session.run();
  const Mesh& mesh = session.mesh();
  Optimizer optimizer(session.store(), run.train.optimizer);
  GradReducer reducer(mesh, session.store().gradients_of(GradientScope::everywhere),
                      session.store().gradients_of(GradientScope::data), session.method().gradient_purpose());
  const RunIdentity identity = identity_of(run, data);
  std::unique_ptr<FolderLock> lock;  // rank 0's
  on_rank_0(mesh.world(), [&] { lock = claim_output(run, identity); });
  Checkpoints checkpoints(run.output_dir, identity, retention_of(run), mesh, session.store(), optimizer,
                          session.method());

  Loader loader(data, run.loader_options(mesh.dp().rank(), mesh.dp().size()));
  std::unique_ptr<TokenFile> eval_file;
  std::vector<Batch> eval_batches;
  if (run.eval_steps > 0) {
    eval_file = std::make_unique<TokenFile>(run.data.eval);
    eval_batches = evaluation_batches(*eval_file, run.loader_options(mesh.dp().rank(), mesh.dp().size()));
  }
  const int64_t total = total_steps(run, data);
  const SamplerOptions sampling = run.loader_options(0, 1).sampler;
  for (const std::string& line : sample_remarks(data, sampling)) console.say(line);
  if (eval_file && run.data.eval != run.data.train) {
    for (const std::string& line : sample_remarks(*eval_file, sampling)) console.say(line);
  }
  console.introduce(session, world, threads);
  const auto predicted = predicted_bytes(session, run.adapter, {});
  const auto gradients = predicted.find(session.method().gradient_purpose());
  console.say(fmt::format("bytes a step: {} of gradients from each rank",
                          human_bytes(gradients == predicted.end() ? 0 : gradients->second)));
  const TrainingState start = starting_point(checkpoints, run, console);
  std::unique_ptr<Observer> metrics;
  if (session.leader()) metrics = metrics_file(run.output_dir + "/metrics.jsonl", start.step);

  const StepParts parts{mesh, session.model(), session.method(), session.store(), optimizer, reducer};
  Trainer trainer(parts, loader, eval_batches, checkpoints, session.ledger(), {&console, metrics.get()},
                  {run.schedule(total), run.train.max_grad_norm, static_cast<uint64_t>(run.train.seed),
                   run.logging_steps, run.eval_steps, run.save_steps});
  const Ledger::Snapshot before = session.ledger().snapshot();
  watch_signals();  // until here a signal ends the process: there is nothing to save
  Outcome outcome{start, trainer.run(start, stop_requested), total, {}};
  const int64_t steps = outcome.state.step - start.step;
  for (const Purpose purpose : kStepPurposes) {
    const auto i = static_cast<size_t>(purpose);
    const int64_t bytes = session.ledger().snapshot()[i].payload_bytes - before[i].payload_bytes;
    if (steps > 0) outcome.bytes_per_step[purpose] = bytes / steps;
  }
  if (outcome.state.step == total) write_result(session, identity);
  return outcome;
}

int run_train(const CommandLine& line, const World& world) {
  const int threads = share_cores(world);
  RunConfig run = read_run(line.run_file, line.overrides);
  check_together(check_training, run, world);
  const TokenFile data(run.data.train);
  set_total_steps(run.adapter, total_steps(run, data));
  Session session(run, world);
  Console console(session.leader(), line.json);
  const Outcome outcome = train(session, data, world, console, threads);
  if (outcome.state.step < outcome.total) {
    console.say(
        fmt::format("stopped after step {} and saved: start the same command again to go on", outcome.state.step));
    return static_cast<int>(ExitCode::stopped);
  }
  if (outcome.start.step == outcome.total)
    console.say(fmt::format("already complete after step {}: nothing was left to train", outcome.total));
  console.say(closing_text(session, outcome.bytes_per_step));
  if (line.json && session.leader()) {
    fmt::print("{}\n", nlohmann::json{{"steps", outcome.total}, {"result", result_path(session)}}.dump());
  }
  return 0;
}

}  // namespace

std::function<int(const World*)> declare_train(CLI::App& app) {
  auto line = std::make_shared<CommandLine>();
  add_run_options(app, *line);
  return [line](const World* world) { return run_train(*line, *world); };
}

}  // namespace corank
