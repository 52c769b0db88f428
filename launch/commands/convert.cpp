#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "configs/error.h"
#include "configs/text.h"
#include "data/storage.h"
#include "launch/adapter_files.h"
#include "launch/commands/commands.h"
#include "launch/console.h"

// export: checkpoint -> PEFT folder; import: the way back. No GPU is needed.
namespace corank {
namespace {

struct ConvertArguments {
  std::string input, output, as = "peft", base;
  std::optional<int64_t> rank;
  std::optional<double> max_error;
  bool json = false;
};

/// What was written: one JSON object, or a sentence.
void print_conversion(const ConvertArguments& a, const nlohmann::ordered_json& object, const std::string& text) {
  fmt::print("{}\n", a.json ? json_text(object) : printable(text));
}

int export_peft(const ConvertArguments& a, const SavedAdapter& adapter, Storage& storage) {
  if (a.rank || a.max_error || !a.base.empty()) {
    throw ConfigError("--r, --max-error and --base belong to --as plain-lora. Leave them out, or add it.");
  }
  write_peft_folder(storage, a.output, adapter);
  print_conversion(
      a, summary(a.output, adapter),
      fmt::format("{}: {} tensors. {}", a.output, adapter.tensors.size(), make_method(adapter.config)->consumers()));
  return 0;
}

/// How much of the updates was lost.
std::string error_text(const PlainLora& plain) {
  if (plain.errors.empty()) return "The conversion is exact.";
  double sum = 0;
  auto worst = plain.errors.front();
  for (const auto& error : plain.errors) {
    sum += error.second;
    if (error.second > worst.second) worst = error;
  }
  return fmt::format("Relative error of the update by SVD: largest {:.6g} ({}), mean {:.6g}.", worst.second,
                     worst.first, sum / static_cast<double>(plain.errors.size()));
}

int export_plain_lora(const ConvertArguments& a, SavedAdapter adapter, Storage& storage) {
  PlainLoraOptions options;
  options.rank = a.rank;
  options.max_error = a.max_error.value_or(options.max_error);
  if (!a.base.empty()) options.base = base_weights(a.base, adapter);
  const PlainLora plain = to_plain_lora(adapter, options);
  write_peft_folder(storage, a.output, plain.file);
  nlohmann::ordered_json object = summary(a.output, plain.file);
  for (const auto& [module, error] : plain.errors) object["errors"][module] = error;
  print_conversion(a, object,
                   fmt::format("{}: plain LoRA of rank {}, {} tensors. {}", a.output, plain.file.config.r,
                               plain.file.tensors.size(), error_text(plain)));
  return 0;
}

int run_export(const ConvertArguments& a, Storage& storage) {
  refuse_own_input(a.input, a.output);
  refuse_foreign_folder(a.output);
  const SavedAdapter adapter = read_checked(a.input);
  return a.as == "plain-lora" ? export_plain_lora(a, adapter, storage) : export_peft(a, adapter, storage);
}

int run_import(const ConvertArguments& a, Storage& storage) {
  if (a.output.size() < 4 || !a.output.ends_with(".h5")) throw ConfigError("--out: give a file name that ends in .h5");
  refuse_own_input(a.input, a.output);
  refuse_foreign_file(a.output);
  const SavedAdapter adapter = read_checked(a.input);
  storage.write_file(a.output, adapter_h5_image(adapter));
  print_conversion(a, summary(a.output, adapter),
                   fmt::format("{}: {} tensors, rank {}, alpha {}", a.output, adapter.tensors.size(), adapter.config.r,
                               adapter.config.lora_alpha));
  return 0;
}

}  // namespace

CommandWork declare_export(CLI::App& app) {
  auto a = std::make_shared<ConvertArguments>();
  app.add_option("checkpoint", a->input, "checkpoint folder or adapter.h5")->required();
  app.add_option("--out", a->output, "folder to write")->required();
  app.add_option("--as", a->as, "peft, or plain-lora: one rank and one alpha, for consumers that know nothing else")
      ->check(CLI::IsMember({"peft", "plain-lora"}));
  app.add_option(
      "--base", a->base,
      "plain-lora of dora and mora, and of one with embedding or head saved along: the folder of the base model");
  app.add_option("--r", a->rank, "plain-lora of dora and mora: rank of the decomposition [twice the adapter's]")
      ->check(CLI::Range(int64_t{1}, kMaxRank));
  app.add_option("--max-error", a->max_error, "refuse a decomposition that loses more of an update [0.05]")
      ->check(CLI::Range(0.0, 1.0));
  app.add_flag("--json", a->json, "one JSON object");
  return [a](const World*, Storage& storage) { return run_export(*a, storage); };
}

CommandWork declare_import(CLI::App& app) {
  auto a = std::make_shared<ConvertArguments>();
  app.add_option("peft_dir", a->input, "PEFT folder")->required();
  app.add_option("--out", a->output, "adapter file to write, .h5")->required();
  app.add_flag("--json", a->json, "one JSON object");
  return [a](const World*, Storage& storage) { return run_import(*a, storage); };
}

}  // namespace corank
