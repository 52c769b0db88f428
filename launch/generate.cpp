#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "launch/commands.h"
#include "launch/session.h"
#include "trainer/generation.h"

namespace corank {
namespace {

struct Arguments : CommandLine {
  std::vector<int64_t> prompt;
  GenerationOptions options;
};

void check_options(const GenerationOptions& o) {
  if (!(o.temperature >= 0 && std::isfinite(o.temperature)))
    throw ConfigError(fmt::format("--temperature: {} is not a finite number of at least 0.", o.temperature));
  if (!(o.top_p > 0 && o.top_p <= 1)) throw ConfigError(fmt::format("--top-p: {} is not in (0, 1].", o.top_p));
}

void check_tokens(const char* option, const std::vector<int64_t>& tokens, int64_t vocab_size) {
  for (const int64_t token : tokens) {
    if (token >= 0 && token < vocab_size) continue;
    throw ConfigError(fmt::format("{}: {} is not in the model's vocabulary [0, {}).", option, token, vocab_size));
  }
}

int run_generate(const Arguments& a, const World& world) {
  share_cores(world);
  check_options(a.options);
  RunConfig run = read_run(a.run_file, a.overrides);
  if (run.parallel.tensor != world.size()) {
    throw ConfigError(
        fmt::format("generate: {} ranks, but parallel.tensor is {}. A prompt has one data-parallel group.",
                    world.size(), run.parallel.tensor));
  }
  run.model.max_positions = static_cast<int64_t>(a.prompt.size()) + a.options.max_new_tokens;
  Session session(run, world);
  check_tokens("--prompt-tokens", a.prompt, session.model().vocab_size());
  check_tokens("--stop-tokens", a.options.stop_tokens, session.model().vocab_size());
  const auto tokens = generate(session.model(), a.prompt, a.options, session.mesh().tp());
  if (!session.leader()) return 0;
  fmt::print("{}\n", a.json ? nlohmann::json{{"tokens", tokens}}.dump() : fmt::format("{}", fmt::join(tokens, ",")));
  return 0;
}

}  // namespace

std::function<int(const World*)> declare_generate(CLI::App& app) {
  auto a = std::make_shared<Arguments>();
  add_run_options(app, *a);
  app.add_option("--prompt-tokens", a->prompt, "token ids, comma-separated")
      ->required()
      ->delimiter(',')
      ->check(CLI::Range(int64_t{0}, std::numeric_limits<int64_t>::max()));
  app.add_option("--max-new-tokens", a->options.max_new_tokens, "tokens to add at most")
      ->check(CLI::Range(1, 1'000'000));
  app.add_option("--temperature", a->options.temperature, "0: greedy");
  app.add_option("--top-p", a->options.top_p, "nucleus sampling");
  app.add_option("--seed", a->options.seed, "of the sampling");
  app.add_option("--stop-tokens", a->options.stop_tokens, "generation ends after one of these")->delimiter(',');
  return [a](const World* world) { return run_generate(*a, *world); };
}

}  // namespace corank
