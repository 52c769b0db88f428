#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <thread>

#include "configs/error.h"
#include "configs/text.h"
#include "data/storage.h"
#include "launch/commands/commands.h"
#include "launch/same_start.h"

namespace {

constexpr corank::Command kCommands[] = {
    {"train", "train an adapter (or all weights) as RUN.yaml says; resumes by itself", corank::declare_train, true},
    {"eval", "mean loss over the target tokens of data.eval", corank::declare_eval, true},
    {"generate", "continue a prompt given as token ids", corank::declare_generate, true},
    {"merge", "base + adapter -> an ordinary model folder", corank::declare_merge, false},
    {"export", "checkpoint -> PEFT folder", corank::declare_export, false},
    {"import", "PEFT folder -> adapter.h5", corank::declare_import, false},
    {"combine", "several adapters -> one PEFT folder", corank::declare_combine, false},
    {"inspect", "what is in a checkpoint, token file, adapter or model", corank::declare_inspect, false},
    {"validate", "every check that train makes before its first step", corank::declare_validate, false},
    {"plan", "memory, bytes, time and layouts of a run, before anything of it is started", corank::declare_plan, false},
    {"bench comm", "bytes of one step by purpose, predicted and counted, against full fine-tuning",
     corank::declare_bench_comm, true},
    {"bench step", "speed and memory of the training step", corank::declare_bench_step, true},
};

/// What every rank refuses rank 0 says, and ends the job, in this time.
constexpr std::chrono::milliseconds kRank0First{500};

struct Chosen {
  const corank::Command* command = nullptr;
  corank::CommandWork run;
  bool among_peers = false;  ///< other ranks may be waiting for this one
  int rank = 0;
};

/// Declares every command of the table on `app`; the parsed one ends up in `chosen`.
void declare_all(CLI::App& app, Chosen& chosen) {
  CLI::App* bench = nullptr;
  for (const corank::Command& command : kCommands) {
    const std::string name = command.name;
    const size_t blank = name.find(' ');
    CLI::App* parent = &app;
    if (blank != std::string::npos) {
      if (!bench) bench = app.add_subcommand(name.substr(0, blank), "measurements")->require_subcommand(1);
      parent = bench;
    }
    CLI::App* sub = parent->add_subcommand(name.substr(blank + 1), command.help);
    auto run = command.declare(*sub);
    sub->callback([&chosen, &command, run = std::move(run)] { chosen = {&command, run, false, 0}; });
  }
}

/// Says what CLI11 would only call unexpected. Options in front are CLI11's.
void refuse_unknown_command(int argc, char** argv) {
  if (argc < 2 || argv[1][0] == '-') return;
  std::vector<std::string> names;
  for (const corank::Command& command : kCommands) {
    names.emplace_back(command.name);
    if (names.back().substr(0, names.back().find(' ')) == argv[1]) return;
  }
  throw corank::ConfigError(fmt::format("'{}' is no command. Commands are {}; `corank COMMAND --help` says more.",
                                        argv[1], fmt::join(names, ", ")));
}

/// Several would write the same files.
void require_one_process(const corank::Command& command) {
  const corank::StartedPlace place = corank::started_place();
  if (place.size == 1) return;
  if (place.rank != 0) {
    std::this_thread::sleep_for(kRank0First);
    _exit(static_cast<int>(corank::ExitCode::usage));
  }
  throw corank::ConfigError(fmt::format("{}: {} ranks, but this command is for one process. Start it without mpirun.",
                                        command.name, place.size));
}

int run(Chosen& chosen, int* argc, char*** argv) {
  corank::DiskStorage storage;
  if (!chosen.command->uses_ranks) {
    require_one_process(*chosen.command);
    return chosen.run(nullptr, storage);
  }
  chosen.among_peers = corank::started_by_mpi();
  corank::World world(argc, argv);
  chosen.rank = world.rank();
  if (!chosen.among_peers) corank::require_no_peers(world);
  corank::require_same_start(world, {*argv + 1, *argv + *argc});
  const int code = chosen.run(&world, storage);
  world.finish();
  return code;
}

/// The process ends with `code`. Where peers may be waiting in a collective the whole job ends with it.
[[noreturn]] void end(const Chosen& chosen, corank::ExitCode code, const std::string& message) {
  if (chosen.rank != 0) std::this_thread::sleep_for(kRank0First);
  fmt::print(stderr, "corank: {}{}\n", chosen.rank == 0 ? "" : fmt::format("rank {}: ", chosen.rank),
             corank::printable(message));
  std::fflush(nullptr);
  if (chosen.among_peers) corank::World::abort(static_cast<int>(code));
  _exit(static_cast<int>(code));
}

}  // namespace

int main(int argc, char** argv) {
  // What the libraries log: standard output belongs to the results.
  spdlog::set_default_logger(spdlog::stderr_logger_mt("corank"));
  spdlog::set_pattern("corank: %v");
  CLI::App app{"corank: low-rank adapters, trained across many ranks"};
  app.name("corank");
  app.set_version_flag("--version", CORANK_VERSION);
  app.require_subcommand(1);
  Chosen chosen;
  declare_all(app, chosen);
  try {
    refuse_unknown_command(argc, argv);
    app.parse(argc, argv);
  } catch (const corank::Error& e) {
    end(chosen, e.code(), e.what());
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);  // --help, --version
    end(chosen, corank::ExitCode::usage, std::string(e.what()) + ". --help says more.");
  }
  try {
    return run(chosen, &argc, &argv);
  } catch (const corank::Error& e) {
    end(chosen, e.code(), e.what());
  } catch (const std::filesystem::filesystem_error& e) {
    end(chosen, corank::ExitCode::storage, e.what());
  } catch (const c10::Error& e) {
    end(chosen, corank::ExitCode::internal, e.what_without_backtrace());
  } catch (const std::exception& e) {
    end(chosen, corank::ExitCode::internal, e.what());
  }
}
