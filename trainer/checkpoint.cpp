#include "trainer/checkpoint.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "data/file.h"
#include "data/h5.h"
#include "trainer/agree.h"
#include "trainer/device.h"

namespace corank {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* kFiles[] = {"adapter.h5", "state.h5"};
constexpr const char* kStateFormat = "corank-state";

/// Steps of the checkpoint folders below `folder`, newest first; valid or not.
std::vector<int64_t> checkpoint_steps(const std::string& folder) {
  std::vector<int64_t> steps;
  if (!fs::is_directory(folder)) return steps;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    const std::string prefix = "checkpoint-";
    if (!name.starts_with(prefix) || name.size() == prefix.size() || name.size() > prefix.size() + 18) continue;
    const std::string digits = name.substr(prefix.size());
    if (digits.find_first_not_of("0123456789") == std::string::npos) steps.push_back(std::stoll(digits));
  }
  std::sort(steps.rbegin(), steps.rend());
  return steps;
}

std::string path_of(const std::string& folder, int64_t step) { return fmt::format("{}/checkpoint-{}", folder, step); }

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

std::string state_image(const TrainingState& state, const std::string& identity,
                        const std::vector<std::pair<std::string, NamedTensors>>& groups) {
  h5::Writer file;
  file.attribute("format", kStateFormat);
  file.attribute("version", int64_t{1});
  file.attribute("identity", identity);
  file.attribute("step", state.step);
  file.attribute("epoch", state.loader.epoch);
  file.attribute("sequence", state.loader.sequence);
  for (const auto& [group, tensors] : groups) {
    for (const auto& [name, tensor] : tensors) file.write(group + "/" + name, tensor);
  }
  return file.finish();
}

json describe(const std::string& bytes) { return {{"bytes", bytes.size()}, {"sha256", sha256(bytes)}}; }

}  // namespace

Checkpoints::Checkpoints(std::string folder, RunIdentity identity, int64_t keep, const Mesh& mesh,
                         ParameterStore& store, Optimizer& optimizer, AdapterMethod& method)
    : folder_(std::move(folder)),
      identity_(std::move(identity)),
      keep_(keep),
      mesh_(mesh),
      store_(store),
      optimizer_(optimizer),
      method_(method) {}

void Checkpoints::save(const TrainingState& state) {
  // Every tensor-parallel group gathers: simpler than choosing one, and all ranks make the same calls.
  const AdapterFile adapter = collect_adapter(store_, method_, identity_, mesh_.tp());
  std::vector<std::pair<std::string, NamedTensors>> groups;
  for (const auto& [group, flat] : state_buffers()) groups.emplace_back(group, store_.gather(flat, mesh_.tp()));
  on_rank_0(mesh_.world(), [&] {
    const std::string path = path_of(folder_, state.step);
    try {
      write(path, state, adapter_h5_image(adapter), state_image(state, identity_.hash, groups));
    } catch (...) {
      std::error_code ignored;
      fs::remove_all(path, ignored);  // nothing half-written stays, e.g. on a full disk
      throw;
    }
    const std::vector<int64_t> steps = checkpoint_steps(folder_);
    for (size_t i = static_cast<size_t>(keep_); i < steps.size(); ++i) fs::remove_all(path_of(folder_, steps[i]));
  });
}

std::vector<std::pair<std::string, at::Tensor>> Checkpoints::state_buffers() {
  std::vector<std::pair<std::string, at::Tensor>> buffers = method_.state();
  buffers.emplace_back("exp_avg", optimizer_.exp_avg());
  buffers.emplace_back("exp_avg_sq", optimizer_.exp_avg_sq());
  return buffers;
}

void Checkpoints::write(const std::string& path, const TrainingState& state, const std::string& adapter,
                        const std::string& moments) const {
  fs::remove_all(path);  // what a crash left, or the same step of an earlier attempt
  make_folders(path);
  const std::string* images[] = {&adapter, &moments};
  json files;
  for (int i = 0; i < 2; ++i) {
    write_file_atomically(path + "/" + kFiles[i], *images[i]);
    files[kFiles[i]] = describe(*images[i]);
  }
  const json manifest{{"format", "corank-checkpoint"},  {"version", 1},   {"step", state.step},
                      {"identity", identity_.hash},     {"files", files}, {"base_model", identity_.base_model},
                      {"libraries", library_versions()}};
  write_file_atomically(path + "/manifest.json", manifest.dump(2) + "\n");
  sync_folder(folder_);
  std::string why;
  if (!verify_checkpoint(path, why)) throw StorageError(path + ": " + why + " right after it was written.");
}

std::optional<std::string> Checkpoints::newest() {
  std::string found;
  on_rank_0(mesh_.world(),
            [&] { found = newest_checkpoint(folder_, identity_.hash, passed_over_).value_or(std::string()); });
  found = broadcast_text(mesh_.world(), found);
  return found.empty() ? std::nullopt : std::optional(found);
}

TrainingState Checkpoints::load(const std::string& path) {
  require_checkpoint(path, identity_.hash);
  const h5::Reader adapter(path + "/adapter.h5");
  std::set<std::string> own;
  for (const auto& p : store_.parameters()) {
    store_.load(p.spec.name, adapter.read(p.spec.name));
    own.insert(p.spec.name);
  }
  store_.refresh();
  NamedTensors extra;
  for (const std::string& path_in_file : adapter.names()) {
    const std::string name = path_in_file.substr(path_in_file.find_first_not_of('/'));
    if (!own.count(name)) extra.emplace_back(name, adapter.read(name));
  }
  method_.take_extra(extra);
  const h5::Reader file(path + "/state.h5");
  const auto restore = [&](const std::string& group, const at::Tensor& flat) {
    for (const auto& p : store_.parameters()) {
      const at::Tensor full = file.read(group + "/" + p.spec.name);
      flat.narrow(0, p.begin, p.master.numel()).view(p.master.sizes()).copy_(take_shard(full, p.spec.shard));
    }
  };
  for (const auto& [group, flat] : state_buffers()) restore(group, flat);
  method_.begin(mesh_);
  return {file.attribute_int("step"), {file.attribute_int("epoch"), file.attribute_int("sequence")}};
}

std::optional<Manifest> verify_checkpoint(const std::string& path, std::string& why) {
  const std::string manifest_path = path + "/manifest.json";
  if (!fs::exists(manifest_path)) {
    why = "manifest.json is missing";
    return std::nullopt;
  }
  const json manifest = json::parse(read_file(manifest_path, int64_t{1} << 20), nullptr, /*allow_exceptions=*/false);
  try {
    for (const char* name : kFiles) {
      const json& file = manifest.at("files").at(name);
      const std::string file_path = path + "/" + name;
      if (!fs::exists(file_path) || fs::file_size(file_path) != file.at("bytes").get<uintmax_t>() ||
          sha256_of_file(file_path) != file.at("sha256").get<std::string>()) {
        why = fmt::format("{} is missing or not what manifest.json describes", name);
        return std::nullopt;
      }
    }
    return Manifest{manifest.at("step").get<int64_t>(), manifest.at("identity").get<std::string>()};
  } catch (const json::exception&) {
    why = "manifest.json is damaged";
    return std::nullopt;
  }
}

std::optional<std::string> newest_checkpoint(const std::string& folder, const std::string& identity,
                                             std::vector<std::string>& passed_over) {
  bool any_completed = false;
  for (const int64_t step : checkpoint_steps(folder)) {
    const std::string path = path_of(folder, step);
    std::string why;
    if (const auto manifest = verify_checkpoint(path, why)) {
      if (manifest->identity == identity) return path;
      throw ConfigError(
          fmt::format("output_dir: {} belongs to another run (its checkpoints were made with other settings or data). "
                      "Choose another output_dir, or resume: never after moving it away.",
                      folder));
    }
    any_completed |= fs::exists(path + "/manifest.json");
    passed_over.push_back(fmt::format("{}: {}", path, why));
  }
  if (!any_completed) return std::nullopt;
  throw InputError(
      fmt::format("output_dir: no checkpoint of {} can be used ({}). Restore one of them, or remove them to start over "
                  "at step 0.",
                  folder, fmt::join(passed_over, "; ")));
}

void require_checkpoint(const std::string& path, const std::string& identity) {
  if (!fs::exists(path)) {
    throw MissingError(fmt::format("resume: {} does not exist. Name a checkpoint folder, auto or never.", path));
  }
  std::string why;
  const auto manifest = verify_checkpoint(path, why);
  if (!manifest) throw InputError(fmt::format("{}: not a complete checkpoint: {}.", path, why));
  if (manifest->identity != identity) {
    throw ConfigError(fmt::format("resume: {} was made by another run (other settings or data).", path));
  }
}

AdapterFile collect_adapter(const ParameterStore& store, const AdapterMethod& method, const RunIdentity& identity,
                            Communicator& tp) {
  AdapterFile file{identity.adapter, identity.base_model, store.gather(store.masters(), tp)};
  for (auto& entry : method.extra_tensors(tp)) file.tensors.push_back(std::move(entry));
  return file;
}

}  // namespace corank
