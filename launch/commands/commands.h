#pragma once
#include <functional>
#include <string>
#include <vector>

#include "comm/world.h"

namespace CLI {
class App;
class Validator;
}  // namespace CLI

namespace corank {

class Storage;

/// Options that most commands share.
struct CommandLine {
  std::string run_file;
  std::vector<std::string> overrides;  ///< key.sub=value
  bool json = false;                   ///< one JSON object on standard output, everything else on standard error
};

/// What runs a command: the exit code, or throws Error. Rank commands get the World, the others nullptr. All that a
/// command leaves on the disk goes through `storage`.
using CommandWork = std::function<int(const World* world, Storage& storage)>;

/// One command of the binary. A command is one file and one line of the table in main.cpp.
struct Command {
  const char* name;
  const char* help;
  /// Declares options on `app` and returns the command's work with them.
  CommandWork (*declare)(CLI::App& app);
  bool uses_ranks;
};

CommandWork declare_train(CLI::App& app);
CommandWork declare_eval(CLI::App& app);
CommandWork declare_generate(CLI::App& app);
CommandWork declare_export(CLI::App& app);
CommandWork declare_import(CLI::App& app);
CommandWork declare_combine(CLI::App& app);
CommandWork declare_inspect(CLI::App& app);
CommandWork declare_merge(CLI::App& app);
CommandWork declare_plan(CLI::App& app);
CommandWork declare_validate(CLI::App& app);
CommandWork declare_bench_comm(CLI::App& app);
CommandWork declare_bench_step(CLI::App& app);

/// For options that take a whole number: decimal digits without a leading zero, which C would read as octal.
CLI::Validator decimal();
/// Adds RUN.yaml, overrides and --json to a command.
void add_run_options(CLI::App& app, CommandLine& line);

/// True once SIGTERM, SIGINT or SIGUSR1 came. Set by the handlers of watch_signals().
bool stop_requested();
void watch_signals();

}  // namespace corank
