#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "configs/error.h"
#include "configs/text.h"
#include "data/h5.h"
#include "data/token_file.h"
#include "data/weight_file.h"
#include "launch/commands/commands.h"
#include "launch/console.h"
#include "trainer/files/adapter_file.h"
#include "trainer/files/peft_config.h"
#include "trainer/run/checkpoint.h"

namespace corank {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

ordered_json describe(const at::Tensor& tensor) {
  return {{"shape", tensor.sizes().vec()},
          {"dtype", c10::toString(tensor.scalar_type())},
          {"bytes", tensor.nbytes()},
          {"norm", at::linalg_vector_norm(tensor.to(at::kDouble)).item<double>()}};
}

ordered_json inspect_adapter(const std::string& path) {
  const SavedAdapter adapter = read_adapter(path);
  ordered_json result{
      {"kind", "adapter"},
      {"base_model", adapter.base_model},
      {"config", ordered_json::parse(peft_config_json(adapter.config, adapted_modules(adapter), adapter.base_model))}};
  for (const auto& [name, tensor] : adapter.tensors) result["tensors"][name] = describe(tensor);
  return result;
}

ordered_json inspect_checkpoint(const std::string& path) {
  std::string why;
  const auto manifest = verify_checkpoint(path, why);
  if (!manifest) throw InputError(fmt::format("{}: not a complete checkpoint: {}.", path, why));
  ordered_json result = inspect_adapter(path);
  result["kind"] = "checkpoint";
  result["step"] = manifest->step;
  result["identity"] = manifest->identity;
  return result;
}

ordered_json inspect_tokens(const std::string& path) {
  const TokenFile file(path);
  const h5::Reader attributes(path);
  int64_t longest = 0;
  for (int64_t i = 0; i < file.size(); ++i) longest = std::max(longest, file.length(i));
  ordered_json result{{"kind", "tokens"},   {"samples", file.size()},          {"tokens", file.num_tokens()},
                      {"longest", longest}, {"vocab_size", file.vocab_size()}, {"sha256", file.fingerprint()}};
  for (const char* name : {"tokenizer", "source", "created"}) {
    if (attributes.has_attribute(name)) result[name] = attributes.attribute_string(name);
  }
  return result;
}

ordered_json inspect_model(const std::string& path) {
  const WeightFile file(path);
  ordered_json result{{"kind", "model"}, {"parameters", 0}};
  int64_t parameters = 0;
  for (const std::string& name : file.names()) {
    const TensorInfo& info = file.info(name);
    result["tensors"][name] = {{"shape", info.shape}, {"dtype", c10::toString(info.dtype)}, {"bytes", info.bytes}};
    parameters += info.bytes / static_cast<int64_t>(c10::elementSize(info.dtype));
  }
  result["parameters"] = parameters;
  return result;
}

[[noreturn]] void point_into_output(const std::string& path) {
  std::vector<std::string> inside;
  for (const auto& entry : fs::directory_iterator(path)) {
    const std::string name = entry.path().filename().string();
    if (name == "adapter" || name == "model" || name.starts_with("checkpoint-"))
      inside.push_back(entry.path().string());
  }
  std::sort(inside.begin(), inside.end());
  throw ConfigError(fmt::format("{}: the output folder of a run. Inspect one thing in it: {}.", path,
                                inside.empty() ? "nothing yet" : fmt::format("{}", fmt::join(inside, ", "))));
}

ordered_json inspect_h5(const std::string& path) {
  const h5::Reader file(path);
  if (file.has("tokens")) return inspect_tokens(path);
  if (file.has_attribute("format") && file.attribute_string("format") == "corank-state") {
    throw ConfigError(path + ": the optimizer's state. Inspect the checkpoint folder that it is in.");
  }
  return inspect_adapter(path);
}

bool is_hdf5(const std::string& path) {
  std::string start(8, '\0');
  if (fs::is_regular_file(path)) std::ifstream(path, std::ios::binary).read(start.data(), 8);
  return start == "\x89HDF\r\n\x1a\n";
}

ordered_json inspect(const std::string& path) {
  if (!fs::exists(path)) throw MissingError(path + ": no such file or folder.");
  if (fs::exists(fs::path(path) / "manifest.json")) return inspect_checkpoint(path);
  for (const char* file : {"adapter_config.json", "adapter.h5"}) {
    if (fs::exists(fs::path(path) / file)) return inspect_adapter(path);
  }
  if (fs::exists(fs::path(path) / "run.yaml")) point_into_output(path);
  if (fs::is_directory(path)) return inspect_model(path);
  if (is_hdf5(path)) return inspect_h5(path);
  throw InputError(path +
                   ": is none of the things that inspect reads: a checkpoint, adapter or model folder, an adapter file "
                   "or a token file (HDF5).");
}

void print_text(const ordered_json& result) {
  for (const auto& [key, value] : result.items()) {
    if (key == "tensors") continue;
    fmt::print("{}: {}\n", printable(key), printable(value.is_string() ? value.get<std::string>() : json_text(value)));
  }
  if (!result.contains("tensors")) return;
  for (const auto& [name, t] : result["tensors"].items()) {
    fmt::print("  {:<70} {:<14} {:>10}{}\n", printable(name), t["shape"].dump(), human_bytes(t["bytes"].get<int64_t>()),
               t.contains("norm") ? fmt::format("  norm {:.4g}", t["norm"].get<double>()) : "");
  }
}

}  // namespace

CommandWork declare_inspect(CLI::App& app) {
  struct InspectArguments {
    std::string path;
    bool json = false;
  };
  auto a = std::make_shared<InspectArguments>();
  app.add_option("path", a->path, "checkpoint, adapter, token file or model folder")->required();
  app.add_flag("--json", a->json, "one JSON object");
  return [a](const World*, Storage&) {
    const ordered_json result = inspect(a->path);
    a->json ? fmt::print("{}\n", json_text(result)) : print_text(result);
    return 0;
  };
}

}  // namespace corank
