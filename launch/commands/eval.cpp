#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <nlohmann/json.hpp>

#include "configs/text.h"
#include "launch/checks.h"
#include "launch/commands/commands.h"
#include "launch/console.h"
#include "launch/same_start.h"
#include "launch/session.h"
#include "trainer/run/step.h"

namespace corank {
namespace {

int run_eval(const CommandLine& command, const World& world) {
  RunConfig run = read_same_run(command.run_file, command.overrides, world);
  share_cores(world, run.one_thread());
  run = with_trained_adapter(run, run.model.quantization != "none");
  check_together(check_evaluation, check_evaluation, run, world);
  Session session(run, world);
  if (session.leader() && run.adapter.path.empty()) {
    fmt::print(stderr, "evaluating the base model: adapter.path names no adapter\n");
  }
  const Mesh& mesh = session.mesh();
  const TokenFile file(run.data.eval);
  const LoaderOptions options = run.loader_options(mesh.dp().rank(), mesh.dp().size());
  const auto batches = evaluation_batches(file, options);
  const EvalResult result = evaluate(mesh, session.model(), batches);
  if (!session.leader()) return 0;
  for (const std::string& line : sample_remarks(file, options.sampler)) fmt::print(stderr, "{}\n", printable(line));
  const int64_t samples = Sampler(file, options.sampler).num_used();
  if (command.json) {
    fmt::print("{}\n", nlohmann::json{{"loss", result.loss},
                                      {"perplexity", std::exp(result.loss)},
                                      {"token_accuracy", result.token_accuracy},
                                      {"target_tokens", result.target_tokens},
                                      {"samples", samples}}
                           .dump());
  } else {
    fmt::print("loss {:.6f}  perplexity {:.4f}  target tokens {}  samples {}\n", result.loss, std::exp(result.loss),
               grouped(result.target_tokens), grouped(samples));
  }
  return 0;
}

}  // namespace

CommandWork declare_eval(CLI::App& app) {
  auto line = std::make_shared<CommandLine>();
  add_run_options(app, *line);
  return [line](const World* world, Storage&) { return run_eval(*line, *world); };
}

}  // namespace corank
