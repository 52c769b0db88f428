#include "trainer/files/combine.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <nlohmann/json.hpp>

#include "configs/error.h"
#include "configs/text.h"
#include "launch/adapter_files.h"
#include "launch/commands/commands.h"
#include "launch/console.h"

// combine: several adapters of one model as one. No model and no GPU is needed.
namespace corank {
namespace {

struct CombineArguments {
  std::vector<std::string> inputs;
  std::vector<double> weights;
  std::string how, output;
  std::optional<int64_t> rank;
  bool json = false;
};

std::vector<WeightedAdapter> read_all(const CombineArguments& a) {
  if (a.weights.size() != a.inputs.size()) {
    throw ConfigError(fmt::format("--weights: {} weights for {} adapters. Give one for each, in their order.",
                                  a.weights.size(), a.inputs.size()));
  }
  std::vector<WeightedAdapter> adapters;
  for (size_t i = 0; i < a.inputs.size(); ++i) {
    if (!std::isfinite(a.weights[i])) throw ConfigError(fmt::format("--weights: {} is no finite number", a.weights[i]));
    refuse_own_input(a.inputs[i], a.output);
    adapters.push_back({a.inputs[i], read_checked(a.inputs[i]), a.weights[i]});
  }
  return adapters;
}

int run_combine(const CombineArguments& a, Storage& storage) {
  refuse_foreign_folder(a.output);
  const SavedAdapter result = combine(read_all(a), a.how, a.rank);
  write_peft_folder(storage, a.output, result);
  fmt::print("{}\n", a.json
                         ? json_text(summary(a.output, result))
                         : printable(fmt::format("{}: {} adapters by {}, plain LoRA of rank {}, {} tensors.", a.output,
                                                 a.inputs.size(), a.how, result.config.r, result.tensors.size())));
  return 0;
}

}  // namespace

CommandWork declare_combine(CLI::App& app) {
  auto a = std::make_shared<CombineArguments>();
  app.add_option("adapters", a->inputs, "PEFT folders, checkpoint folders or adapter.h5 files")->required();
  app.add_option("--weights", a->weights, "one number for each adapter, comma-separated")
      ->required()
      ->delimiter(',')
      ->allow_extra_args(false);
  app.add_option("--how", a->how, "cat: the weighted sum exactly; svd: cut to a rank; linear: sums of A and of B")
      ->required()
      ->check(CLI::IsMember(combination_names()));
  app.add_option("--r", a->rank, "svd: rank of the result [the adapters' largest]")
      ->check(CLI::Range(int64_t{1}, kMaxRank));
  app.add_option("--out", a->output, "folder to write")->required();
  app.add_flag("--json", a->json, "one JSON object");
  return [a](const World*, Storage& storage) { return run_combine(*a, storage); };
}

}  // namespace corank
