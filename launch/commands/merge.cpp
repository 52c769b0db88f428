#include "trainer/files/merge.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "configs/text.h"
#include "data/storage.h"
#include "launch/commands/commands.h"
#include "launch/console.h"
#include "launch/session.h"
#include "trainer/methods/methods.h"

// merge: base + adapter -> an ordinary model folder. No ranks and no GPU are needed.
namespace corank {
namespace {

namespace fs = std::filesystem;

struct MergeArguments : CommandLine {
  std::string output, base;
};

void check_run(const RunConfig& run) {
  if (run.model.path.empty()) {
    throw ConfigError(run.file + ": model.shape: random weights have no folder to merge into. Name a model.path.");
  }
  if (make_method(run.adapter)->trains_base()) {
    throw ConfigError(run.file +
                      ": adapter.method: full fine-tuning leaves a whole model, output_dir/model: nothing is to be "
                      "merged.");
  }
  if (run.adapter.path.empty()) {
    throw ConfigError(run.file + ": adapter.path: names no adapter to merge. Give adapter.path=OUTPUT_DIR/adapter.");
  }
}

void check_merge_output(const MergeArguments& a, const RunConfig& run) {
  if (fs::exists(a.output) && fs::exists(run.model.path) && fs::equivalent(a.output, run.model.path)) {
    throw ConfigError(fmt::format("--out: {} is the model itself. Choose a new folder.", a.output));
  }
  if (fs::exists(a.output) && (!fs::is_directory(a.output) || !fs::is_empty(a.output))) {
    throw ConfigError(fmt::format("--out: {} holds something already. Choose a new folder, or remove it.", a.output));
  }
}

/// Whether the base is what model.quantization makes of the folder.
bool dequantizes(const MergeArguments& a, const RunConfig& run) {
  const bool is_quantised = run.model.quantization != "none";
  if (a.base.empty()) return is_quantised;
  if (a.base == "dequantized" && !is_quantised) {
    throw ConfigError("--base dequantized: model.quantization is none, so nothing is quantised. Leave it out.");
  }
  return a.base == "dequantized";
}

SavedAdapter adapter_of(const RunConfig& run) {
  Ledger ledger;
  const auto solo = make_solo_communicator(at::kCPU, ledger);
  return read_run_adapter(run, *outline_model(run.model, *solo));
}

void print_merge(const MergeArguments& a, const RunConfig& run, const MergeResult& result, bool dequantize) {
  const std::string base = dequantize ? "dequantized" : run.model.quantization == "none" ? "stored" : "original";
  if (a.json) {
    fmt::print("{}\n", json_text({{"path", a.output},
                                  {"base", base},
                                  {"merged", result.merged},
                                  {"replaced", result.replaced},
                                  {"tensors", result.tensors},
                                  {"bytes", result.bytes}}));
    return;
  }
  const std::string kind = dequantize         ? fmt::format(" of the {} base, dequantised,", run.model.quantization)
                           : base == "stored" ? ""
                                              : " of the base as the folder holds it, not as the run quantises it,";
  fmt::print("{}: {} tensors, {}; the adapter changed {} linears{} and replaced {} tensors\n", printable(a.output),
             grouped(result.tensors), human_bytes(result.bytes), result.merged, kind, result.replaced);
}

int run_merge(const MergeArguments& a, Storage& storage) {
  RunConfig run = read_run(a.run_file, a.overrides);
  run.model.max_positions = 1;  // no sequence will come
  check_run(run);
  check_merge_output(a, run);
  const bool dequantize = dequantizes(a, run);
  const SavedAdapter adapter = adapter_of(with_trained_adapter(run, dequantize));
  AtomicFolder folder(storage, a.output);
  const MergeResult result = write_merged_model(storage, folder.path(), run.model, adapter, dequantize);
  folder.commit();
  print_merge(a, run, result, dequantize);
  return 0;
}

}  // namespace

CommandWork declare_merge(CLI::App& app) {
  auto a = std::make_shared<MergeArguments>();
  add_run_options(app, *a);
  app.add_option("--out", a->output, "folder to write: new, or empty")->required();
  app.add_option("--base", a->base,
                 "of a quantised run: dequantized (default), the weights that the adapter was trained on, in the run's "
                 "dtype; original, those of the folder")
      ->check(CLI::IsMember({"dequantized", "original"}));
  return [a](const World*, Storage& storage) { return run_merge(*a, storage); };
}

}  // namespace corank
