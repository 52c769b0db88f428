#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>

#include "comm/agree.h"
#include "data/file.h"
#include "data/json_object.h"
#include "launch/commands/commands.h"
#include "launch/same_start.h"
#include "launch/session.h"
#include "trainer/run/generation.h"

namespace corank {
namespace {

using nlohmann::json;

constexpr int64_t kMaxNewTokens = 1'000'000;
constexpr int64_t kMaxConfigBytes = int64_t{1} << 24;
constexpr const char* kEnd = "eos_token_id";

struct GenerateArguments : CommandLine {
  std::string prompt, stop_tokens;  ///< ids, comma-separated
  GenerationOptions options;
  std::vector<std::string> adapters;  ///< NAME=PATH
  std::string use;
  bool merge = false, serve = false, ignore_eos = false;
  int64_t max_positions = 0;
};

/// One continuation to make.
struct Request {
  std::vector<int64_t> prompt;
  std::string adapter;
  GenerationOptions options;
};

/// Comma-separated ids as a command line gives them.
std::vector<int64_t> token_ids(const std::string& option, const std::string& text) {
  std::vector<int64_t> ids;
  const CLI::Validator whole = decimal();
  for (size_t begin = 0; !text.empty() && begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    std::string id = text.substr(begin, end - begin);
    if (const std::string why = whole(id); !why.empty()) throw ConfigError(fmt::format("{}: {}.", option, why));
    ids.push_back(std::stoll(id));
    begin = end + 1;
  }
  return ids;
}

void check_options(const GenerationOptions& o) {
  if (o.max_new_tokens < 1 || o.max_new_tokens > kMaxNewTokens)
    throw ConfigError(fmt::format("max_new_tokens: {} is not in [1, {}].", o.max_new_tokens, kMaxNewTokens));
  if (!(o.temperature >= 0 && std::isfinite(o.temperature)))
    throw ConfigError(fmt::format("temperature: {} is not a finite number of at least 0.", o.temperature));
  if (!(o.top_p > 0 && o.top_p <= 1)) throw ConfigError(fmt::format("top_p: {} is not in (0, 1].", o.top_p));
}

void check_token_ids(const char* option, const std::vector<int64_t>& tokens, int64_t vocab_size) {
  for (const int64_t token : tokens) {
    if (token >= 0 && token < vocab_size) continue;
    throw ConfigError(fmt::format("{}: {} is not in the model's vocabulary [0, {}).", option, token, vocab_size));
  }
}

std::vector<NamedAdapter> named_adapters(const std::vector<std::string>& options) {
  std::vector<NamedAdapter> adapters;
  for (const std::string& option : options) {
    const size_t end = option.find('=');
    if (end == std::string::npos || end + 1 == option.size()) {
      throw ConfigError(fmt::format("--adapter: '{}' is not of the form NAME=PATH.", option));
    }
    adapters.push_back({option.substr(0, end), option.substr(end + 1)});
  }
  return adapters;
}

/// The ids at which the model's makers end an answer: those of generation_config.json, else of config.json.
std::vector<int64_t> end_tokens(const std::string& folder) {
  for (const char* name : {"generation_config.json", "config.json"}) {
    const std::string path = folder + "/" + name;
    if (!std::filesystem::exists(path)) continue;
    const JsonObject file(read_file(path, kMaxConfigBytes), path);
    if (!file.has(kEnd)) continue;
    return file.value(kEnd).is_array() ? file.get<std::vector<int64_t>>(kEnd)
                                       : std::vector<int64_t>{file.get<int64_t>(kEnd)};
  }
  return {};
}

/// A line of JSON as a request; what it leaves out is as the command line says.
Request parse_request(const std::string& line, Request request) {
  const JsonObject object(line, "request");
  GenerationOptions& o = request.options;
  request.prompt = object.get<std::vector<int64_t>>("prompt", {});
  request.adapter = object.get("adapter", request.adapter);
  o.max_new_tokens = object.get("max_new_tokens", o.max_new_tokens);
  o.temperature = object.get("temperature", o.temperature);
  o.top_p = object.get("top_p", o.top_p);
  const auto seed = object.get("seed", static_cast<int64_t>(o.seed));
  if (seed < 0) object.fail(fmt::format("seed is {}, and a seed is a number of at least 0", seed));
  o.seed = static_cast<uint64_t>(seed);
  o.stop_tokens = object.get("stop_tokens", o.stop_tokens);
  if (const auto others = object.unknown(); !others.empty()) {
    object.fail(shown_key(others.front()) +
                " is not one of prompt, adapter, max_new_tokens, temperature, top_p, seed, stop_tokens");
  }
  if (request.prompt.empty()) object.fail("prompt is missing. Give a list of token ids");
  return request;
}

/// Collective over the mesh.
std::vector<int64_t> answer(Inference& inference, const Request& request, int64_t max_positions) {
  check_options(request.options);
  check_token_ids("prompt", request.prompt, inference.model().vocab_size());
  check_token_ids("stop_tokens", request.options.stop_tokens, inference.model().vocab_size());
  const int64_t positions = static_cast<int64_t>(request.prompt.size()) + request.options.max_new_tokens;
  if (positions > max_positions) {
    throw ConfigError(
        fmt::format("the prompt's {} tokens and max_new_tokens {} are more than the {} positions of this process. "
                    "Shorten one of them, or start with a larger --max-positions.",
                    request.prompt.size(), request.options.max_new_tokens, max_positions));
  }
  inference.adapters().use(request.adapter);
  return generate(inference.model(), request.prompt, request.options, inference.mesh().tp());
}

/// Collective over `world`. The next line of rank 0's standard input; false at its end.
bool next_line(Communicator& world, std::string& line) {
  std::string message;  // a line is marked, so that an empty one is not the end
  if (world.rank() == 0 && std::getline(std::cin, line)) message = "+" + line;
  message = broadcast_text(world, message);
  if (message.empty()) return false;
  line = message.substr(1);
  return true;
}

/// Collective over the mesh. What every rank refuses alike is an answer too, and the process goes on.
json respond(Inference& inference, const std::string& line, const Request& defaults, int64_t max_positions) {
  try {
    const Request request = parse_request(line, defaults);
    const auto tokens = answer(inference, request, max_positions);
    return {{"adapter", request.adapter}, {"tokens", tokens}};
  } catch (const ConfigError& e) {
    return {{"error", e.what()}};
  } catch (const InputError& e) {
    return {{"error", e.what()}};
  }
}

void serve(Inference& inference, const Request& defaults, int64_t max_positions) {
  for (std::string line; next_line(inference.mesh().world(), line);) {
    const json response = respond(inference, line, defaults, max_positions);
    if (!inference.leader()) continue;
    // an error may quote bytes of the request that are no UTF-8
    fmt::print("{}\n", response.dump(-1, ' ', false, json::error_handler_t::replace));
    std::fflush(stdout);
  }
}

void check_mode(const GenerateArguments& a) {
  if (a.serve == a.prompt.empty()) return;
  throw ConfigError(a.serve ? "--serve: prompts come from standard input. Leave --prompt-tokens out."
                            : "--prompt-tokens is missing. Give token ids, or --serve to read requests.");
}

int run_generate(const GenerateArguments& a, const World& world) {
  share_cores(world);
  check_mode(a);
  const std::vector<int64_t> prompt = token_ids("--prompt-tokens", a.prompt);
  GenerationOptions options = a.options;
  options.stop_tokens = token_ids("--stop-tokens", a.stop_tokens);
  check_options(options);
  RunConfig run = read_same_run(a.run_file, a.overrides, world);
  run = with_trained_adapter(run, run.model.quantization != "none");
  if (run.parallel.tensor != world.size()) {
    throw ConfigError(
        fmt::format("generate: {} ranks, but parallel.tensor is {}. A prompt has one data-parallel group.",
                    world.size(), run.parallel.tensor));
  }
  run.model.max_positions = a.serve ? a.max_positions : static_cast<int64_t>(prompt.size()) + options.max_new_tokens;
  const bool own_ends = options.stop_tokens.empty() && !a.ignore_eos && !run.model.path.empty();
  const std::vector<int64_t> ends = own_ends ? end_tokens(run.model.path) : std::vector<int64_t>();
  Inference inference(run, named_adapters(a.adapters), a.merge, world);
  const std::vector<std::string> names = inference.adapters().names();
  const std::string first = names.empty() ? AdapterSet::kBase : names.front();
  Request request{prompt, a.use.empty() ? first : a.use, options};
  for (const int64_t id : ends) {
    if (id >= 0 && id < inference.model().vocab_size()) request.options.stop_tokens.push_back(id);
  }
  inference.adapters().use(request.adapter);
  if (a.serve) {
    serve(inference, request, run.model.max_positions);
    return 0;
  }
  const auto tokens = answer(inference, request, run.model.max_positions);
  if (!inference.leader()) return 0;
  fmt::print("{}\n", a.json ? json{{"tokens", tokens}}.dump() : fmt::format("{}", fmt::join(tokens, ",")));
  return 0;
}

}  // namespace

CommandWork declare_generate(CLI::App& app) {
  auto a = std::make_shared<GenerateArguments>();
  add_run_options(app, *a);
  app.add_option("--prompt-tokens", a->prompt, "token ids, comma-separated");
  app.add_option("--max-new-tokens", a->options.max_new_tokens, "tokens to add at most")
      ->check(decimal())
      ->check(CLI::Range(int64_t{1}, kMaxNewTokens));
  app.add_option("--temperature", a->options.temperature, "0: greedy");
  app.add_option("--top-p", a->options.top_p, "nucleus sampling");
  app.add_option("--seed", a->options.seed, "of the sampling")->check(decimal());
  auto* stops = app.add_option("--stop-tokens", a->stop_tokens,
                               "generation ends after one of these (default: every eos_token_id of the model's "
                               "generation_config.json, else of its config.json)");
  app.add_flag("--ignore-eos", a->ignore_eos, "go on to --max-new-tokens whatever comes")->excludes(stops);
  app.add_option("--adapter", a->adapters,
                 "NAME=PATH, as often as wanted: adapters of any methods over the one base, beside that of "
                 "adapter.path, which is called default")
      ->allow_extra_args(false);
  app.add_option("--use", a->use, "the adapter to answer with; base: none (default: the first)");
  app.add_flag("--merge", a->merge,
               "merge the adapter into the base: the speed of the base; a quantised base is held dense, in the memory "
               "of model.dtype");
  app.add_flag("--serve", a->serve,
               "read requests from standard input, one JSON object a line: prompt, and adapter, max_new_tokens, "
               "temperature, top_p, seed, stop_tokens where they differ from the command line's; answer each with a "
               "line {\"adapter\", \"tokens\"} or {\"error\"}");
  app.add_option("--max-positions", a->max_positions, "with --serve: the most tokens of a prompt and its answer")
      ->default_val(4096)
      ->check(decimal())
      ->check(CLI::Range(int64_t{2}, int64_t{1} << 20));
  return [a](const World* world, Storage&) { return run_generate(*a, *world); };
}

}  // namespace corank
