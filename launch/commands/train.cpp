#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "comm/agree.h"
#include "data/file.h"
#include "data/storage.h"
#include "launch/checks.h"
#include "launch/commands/commands.h"
#include "launch/console.h"
#include "launch/plan_watch.h"
#include "launch/results.h"
#include "launch/same_start.h"
#include "launch/session.h"
#include "trainer/run/metrics.h"
#include "trainer/run/trainer.h"

namespace corank {
namespace {

/// The checkpoints that a run keeps.
Retention retention_of(const RunConfig& run) {
  const bool names_one = run.resume != "auto" && run.resume != "never";
  return {run.save_total_limit, names_one ? run.resume : ""};
}

/// Claims output_dir for this run: refuses one that holds another run or that another process is using, removes what an
/// interrupted write left, and leaves run.yaml.
std::unique_ptr<FolderLock> claim_output(const RunConfig& run, const RunIdentity& identity, Storage& storage) {
  check_output(run, identity);
  storage.make_folders(run.output_dir);
  auto lock = std::make_unique<FolderLock>(run.output_dir);
  remove_leftovers(storage, run.output_dir);
  storage.write_file(run.output_dir + "/run.yaml", identity_line(identity) + run.yaml());
  return lock;
}

/// The batches of data.eval where the run evaluates; adds to `remarks` where it is another file than data.train.
std::vector<Batch> held_out_batches(const RunConfig& run, const Mesh& mesh, std::vector<std::string>& remarks) {
  if (run.eval_steps == 0) return {};
  const TokenFile file(run.data.eval);
  const LoaderOptions options = run.loader_options(mesh.dp().rank(), mesh.dp().size());
  if (run.data.eval != run.data.train) {
    for (const std::string& line : sample_remarks(file, options.sampler)) remarks.push_back(line);
  }
  return evaluation_batches(file, options);
}

/// `about`: what to tell at the start, but for remarks on the data. Returns the state reached.
TrainingState train(Session& session, const TokenFile& data, StartRecord about, int64_t total,
                    std::vector<Observer*> observers, Storage& storage) {
  const RunConfig& run = session.run();
  const Mesh& mesh = session.mesh();
  Optimizer optimizer(session.store(), run.train.optimizer);
  const auto sum = make_gradient_sum(session);
  const RunIdentity identity = identity_of(run, data);
  require_same(mesh.world(),
               {{"run, data or config.json", "identity " + identity.hash, "Give every host the same files."}});
  std::unique_ptr<FolderLock> lock;  // rank 0's
  on_rank_0(mesh.world(), [&] { lock = claim_output(run, identity, storage); });
  Checkpoints checkpoints(storage, run.output_dir, identity, retention_of(run), mesh, session.store(), optimizer, *sum,
                          session.method());

  const LoaderOptions order = run.loader_options(mesh.dp().rank(), mesh.dp().size());
  Loader loader(data, order);
  about.remarks = sample_remarks(data, order.sampler);
  const std::vector<Batch> eval_batches = held_out_batches(run, mesh, about.remarks);

  const auto metrics = metrics_file(storage, run.output_dir + "/metrics.jsonl");
  observers.push_back(metrics.get());
  DropoutKeys dropout(static_cast<uint64_t>(run.train.seed), mesh.device());
  const StepParts parts{mesh, session.model(), session.method(), session.store(), optimizer, *sum, dropout};
  Trainer trainer(parts, loader, eval_batches, checkpoints, session.ledger(), observers,
                  {run.schedule(total), run.train.max_grad_norm, run.logging_steps, run.eval_steps, run.save_steps});
  const TrainingState start = trainer.start(about, run.resume);
  watch_signals();  // until here a signal ends the process: there is nothing to save
  return trainer.run(start, stop_requested, [&] { return write_result(session, identity, storage); });
}

int run_train(const CommandLine& line, const World& world, Storage& storage) {
  RunConfig run = read_same_run(line.run_file, line.overrides, world);
  const int threads = share_cores(world, run.one_thread());
  check_together(check_training, check_training_inputs, run, world);
  const TokenFile data(run.data.train);
  const int64_t total = total_steps(run, data);
  set_total_steps(run.adapter, total);
  Session session(run, world);
  Console console(session, line.json);
  PlanWatch watch(session, world, line.json);
  const TrainingState end =
      train(session, data, start_record(session, world, threads), total, {&watch, &console}, storage);
  if (end.step < total) return static_cast<int>(ExitCode::stopped);
  if (line.json && session.leader()) {
    fmt::print("{}\n", nlohmann::json{{"steps", total}, {"result", result_path(session)}}.dump());
  }
  return 0;
}

}  // namespace

CommandWork declare_train(CLI::App& app) {
  auto line = std::make_shared<CommandLine>();
  add_run_options(app, *line);
  return [line](const World* world, Storage& storage) { return run_train(*line, *world, storage); };
}

}  // namespace corank
