#include <CLI/CLI.hpp>
#include <csignal>

#include "launch/commands/commands.h"

namespace corank {
namespace {

volatile std::sig_atomic_t signal_came = 0;  // a signal handler can reach nothing else

}  // namespace

CLI::Validator decimal() {
  return {[](std::string& text) {
            const bool digits = !text.empty() && text.find_first_not_of("0123456789") == std::string::npos;
            const bool plain = digits && text.size() <= 18 && (text.size() == 1 || text[0] != '0');
            return plain ? std::string() : "'" + text + "' is not a whole number in decimal digits";
          },
          ""};
}

void add_run_options(CLI::App& app, CommandLine& line) {
  app.add_option("run_file", line.run_file, "the run, YAML")->required();
  app.add_option("overrides", line.overrides, "key.sub=value, laid over the run file");
  app.add_flag("--json", line.json, "one JSON object on standard output, everything else on standard error");
}

bool stop_requested() { return signal_came != 0; }

void watch_signals() {
  for (const int signal : {SIGTERM, SIGINT, SIGUSR1}) {
    std::signal(signal, [](int) { signal_came = 1; });
  }
}

}  // namespace corank
