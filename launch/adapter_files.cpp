#include "launch/adapter_files.h"

#include <fmt/format.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "configs/error.h"
#include "trainer/files/check_adapter.h"
#include "trainer/files/saved_along.h"
#include "trainer/methods/start.h"
#include "trainer/models/families.h"
#include "trainer/run/checkpoint.h"

namespace corank {

namespace fs = std::filesystem;

SavedAdapter read_checked(const std::string& path) {
  std::string why;
  if (fs::exists(fs::path(path) / "manifest.json") && !verify_checkpoint(path, why)) {
    throw InputError(fmt::format("{}: not a complete checkpoint: {}.", path, why));
  }
  SavedAdapter adapter = read_adapter(path);
  check_adapter(adapter, path);
  return adapter;
}

void refuse_own_input(const std::string& input, const std::string& output) {
  if (fs::exists(output) && fs::exists(input) && fs::equivalent(input, output)) {
    throw ConfigError(fmt::format("--out: {} is the input itself.", output));
  }
  if (fs::exists(fs::path(output) / "manifest.json")) {
    throw ConfigError(fmt::format("--out: {} is a checkpoint; choose another folder.", output));
  }
}

void refuse_foreign_file(const std::string& file) {
  if (!fs::exists(file)) return;
  try {
    read_adapter(file);
  } catch (const std::exception&) {
    throw ConfigError(fmt::format("--out: {} exists and holds no adapter. Choose a new file, or remove it.", file));
  }
}

void refuse_foreign_folder(const std::string& folder) {
  if (!fs::is_directory(folder) || fs::is_empty(folder) || fs::exists(fs::path(folder) / "adapter_config.json")) return;
  throw ConfigError(fmt::format(
      "--out: {} holds other files and no earlier adapter (adapter_config.json). Choose a new folder.", folder));
}

nlohmann::ordered_json summary(const std::string& path, const SavedAdapter& adapter) {
  return {{"path", path},
          {"tensors", adapter.tensors.size()},
          {"r", adapter.config.r},
          {"lora_alpha", adapter.config.lora_alpha}};
}

BaseWeights base_weights(const std::string& folder, SavedAdapter& adapter) {
  const auto reader = std::make_shared<LinearReader>(folder);
  ModelOptions exact;
  exact.path = folder;
  exact.dtype = at::kFloat;
  place_saved_along(adapter, reader->outline(), exact, "--base");
  ParameterStore store;
  const auto method = make_method(adapter.config);
  register_parameters(*method, reader->outline(), store, 0);
  check_fits(*method, adapter, store);
  return [reader](const std::string& module) { return reader->read(module); };
}

}  // namespace corank
