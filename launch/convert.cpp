#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "configs/error.h"
#include "data/file.h"
#include "launch/commands.h"
#include "trainer/adapter/adapter_file.h"
#include "trainer/adapter/methods.h"
#include "trainer/checkpoint.h"

// export: checkpoint -> PEFT folder; import: the way back. No model and no GPU is needed.
namespace corank {
namespace {

namespace fs = std::filesystem;

struct Arguments {
  std::string input, output, as = "peft";
  bool json = false;
};

void refuse_own_input(const Arguments& a) {
  if (fs::exists(a.output) && fs::exists(a.input) && fs::equivalent(a.input, a.output)) {
    throw ConfigError(fmt::format("--out: {} is the input itself.", a.output));
  }
  if (fs::exists(fs::path(a.output) / "manifest.json")) {
    throw ConfigError(fmt::format("--out: {} is a checkpoint; choose another folder.", a.output));
  }
}

/// Nothing of somebody else's is mixed with an adapter: the folder is new, empty, or an earlier adapter's.
void refuse_foreign_folder(const std::string& folder) {
  if (!fs::is_directory(folder) || fs::is_empty(folder) || fs::exists(fs::path(folder) / "adapter_config.json")) return;
  throw ConfigError(fmt::format(
      "--out: {} holds other files and no earlier adapter (adapter_config.json). Choose a new folder.", folder));
}

AdapterFile read_checked(const std::string& path) {
  AdapterFile adapter = read_adapter(path);
  check_adapter(adapter, path);
  return adapter;
}

/// What was written: one JSON object, or a sentence.
void report(const Arguments& a, const AdapterFile& adapter, const std::string& text) {
  const nlohmann::json object{{"path", a.output},
                              {"tensors", adapter.tensors.size()},
                              {"r", adapter.config.r},
                              {"lora_alpha", adapter.config.lora_alpha}};
  fmt::print("{}\n", a.json ? object.dump() : text);
}

int run_export(const Arguments& a) {
  refuse_own_input(a);
  refuse_foreign_folder(a.output);
  std::string why;
  if (fs::exists(fs::path(a.input) / "manifest.json") && !verify_checkpoint(a.input, why)) {
    throw InputError(fmt::format("{}: not a complete checkpoint: {}.", a.input, why));
  }
  const AdapterFile adapter = read_checked(a.input);
  const auto method = make_method(adapter.config);
  if (const std::string beyond = method->beyond_plain_lora(); a.as == "plain-lora" && !beyond.empty()) {
    throw ConfigError(fmt::format("--as plain-lora: {} cannot become one: {}. Export it --as peft.", a.input, beyond));
  }
  write_peft_folder(a.output, adapter);
  report(a, adapter, fmt::format("{}: {} tensors. {}", a.output, adapter.tensors.size(), method->consumers()));
  return 0;
}

int run_import(const Arguments& a) {
  if (a.output.size() < 4 || !a.output.ends_with(".h5")) throw ConfigError("--out: give a file name that ends in .h5");
  refuse_own_input(a);
  const AdapterFile adapter = read_checked(a.input);
  write_file_atomically(a.output, adapter_h5_image(adapter));
  report(a, adapter,
         fmt::format("{}: {} tensors, rank {}, alpha {}", a.output, adapter.tensors.size(), adapter.config.r,
                     adapter.config.lora_alpha));
  return 0;
}

}  // namespace

std::function<int(const World*)> declare_export(CLI::App& app) {
  auto a = std::make_shared<Arguments>();
  app.add_option("checkpoint", a->input, "checkpoint folder or adapter.h5")->required();
  app.add_option("--out", a->output, "folder to write")->required();
  app.add_option("--as", a->as, "peft, or plain-lora: refused unless consumers of plain LoRA can take it")
      ->check(CLI::IsMember({"peft", "plain-lora"}));
  app.add_flag("--json", a->json, "one JSON object");
  return [a](const World*) { return run_export(*a); };
}

std::function<int(const World*)> declare_import(CLI::App& app) {
  auto a = std::make_shared<Arguments>();
  app.add_option("peft_dir", a->input, "PEFT folder")->required();
  app.add_option("--out", a->output, "adapter file to write, .h5")->required();
  app.add_flag("--json", a->json, "one JSON object");
  return [a](const World*) { return run_import(*a); };
}

}  // namespace corank
