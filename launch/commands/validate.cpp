#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <set>

#include "configs/text.h"
#include "launch/checks.h"
#include "launch/commands/commands.h"
#include "launch/console.h"

namespace corank {
namespace {

struct ValidateArguments : CommandLine {
  int ranks = 0;
};

int run_validate(const ValidateArguments& a) {
  const RunConfig run = read_run(a.run_file, a.overrides);
  const int ranks = a.ranks > 0 ? a.ranks : static_cast<int>(run.parallel.tensor);
  const CheckedInputs inputs = check_training(run, ranks);
  for (const std::string& path : std::set<std::string>{run.data.train, run.data.eval}) {
    if (path.empty()) continue;
    const TokenFile file(path);
    for (const std::string& line : sample_remarks(file, run.loader_options(0, 1).sampler)) {
      fmt::print(stderr, "{}\n", printable(line));
    }
  }
  if (a.json) {
    fmt::print("{}\n", nlohmann::json{{"valid", true},
                                      {"train_samples", inputs.train_samples},
                                      {"eval_samples", inputs.eval_samples},
                                      {"base_parameters", inputs.base_parameters},
                                      {"targets", inputs.targets.size()}}
                           .dump());
  } else {
    fmt::print(
        "{} is valid for {} rank{}: {} base parameters, {} adapted modules, {} training and {} evaluation samples\n",
        printable(a.run_file), ranks, ranks == 1 ? "" : "s", grouped(inputs.base_parameters), inputs.targets.size(),
        grouped(inputs.train_samples), grouped(inputs.eval_samples));
  }
  return 0;
}

}  // namespace

CommandWork declare_validate(CLI::App& app) {
  auto a = std::make_shared<ValidateArguments>();
  add_run_options(app, *a);
  app.add_option("--ranks", a->ranks, "number of ranks to check for (default: parallel.tensor)")
      ->check(CLI::Range(1, 1 << 20));
  return [a](const World*, Storage&) { return run_validate(*a); };
}

}  // namespace corank
