#include "trainer/run/checkpoint.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <set>

#include "comm/agree.h"
#include "configs/error.h"
#include "data/file.h"
#include "data/h5.h"
#include "data/storage.h"

namespace corank {
namespace {

constexpr const char* kStateFormat = "corank-state";

using StateTensors = std::vector<std::pair<std::string, at::Tensor>>;

std::string state_image(const TrainingState& state, const std::string& identity,
                        const std::vector<std::pair<std::string, StateTensors>>& groups) {
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

/// Where what one rank carries on lies in state.h5. Its layout is that of a rank under this tensor-parallel size.
std::string carried_group(const Mesh& mesh) { return fmt::format("carried-tensor-{}", mesh.tp().size()); }

/// Collective over the world. What each rank carries on, by rank.
StateTensors collect_carried(const Mesh& mesh, const GradientSum& sum) {
  StateTensors by_rank;
  const at::Tensor own = sum.carried();
  for (int rank = 0; own.defined() && rank < mesh.world().size(); ++rank) {
    const at::Tensor one = own.clone();
    mesh.world().broadcast(one, rank, Purpose::checkpoint);
    by_rank.emplace_back(std::to_string(rank), one.to(at::kCPU));
  }
  return by_rank;
}

/// Deals what the saved ranks carried on to those of today, which may be more or fewer over data: only the sum counts.
void deal_carried(const h5::Reader& file, const Mesh& mesh, const GradientSum& sum) {
  const at::Tensor own = sum.carried();
  if (!own.defined()) return;
  const auto name = [&](int rank) { return fmt::format("{}/{}", carried_group(mesh), rank); };
  if (!file.has(name(0))) {
    throw ConfigError(fmt::format(
        "{}: holds what was left of gradients that travelled in bfloat16, by rank, under another parallel.tensor than "
        "{}. Go on with the one that saved it.",
        file.origin(), mesh.tp().size()));
  }
  own.zero_();
  for (int rank = 0; file.has(name(rank)); ++rank) {
    if (rank % mesh.world().size() == mesh.world().rank()) own.add_(file.read(name(rank)).to(own.device()));
  }
}

Manifest::File describe(const std::string& name, const std::string& bytes) {
  return {name, static_cast<int64_t>(bytes.size()), sha256(bytes)};
}

/// Rank 0 found it where it writes; all ranks read it.
void require_on_this_host(const std::string& path, const Communicator& world) {
  if (world.rank() == 0 || std::filesystem::exists(path)) return;
  throw MissingError(
      fmt::format("{} is not on this host, and every rank reads the checkpoint that it resumes from. Copy it to every "
                  "host, or keep "
                  "output_dir in a folder that all of them share.",
                  path));
}

}  // namespace

Checkpoints::Checkpoints(Storage& storage, std::string folder, RunIdentity identity, Retention retention,
                         const Mesh& mesh, ParameterStore& store, Optimizer& optimizer, GradientSum& sum,
                         AdapterMethod& method)
    : storage_(storage),
      folder_(std::move(folder)),
      identity_(std::move(identity)),
      retention_(std::move(retention)),
      mesh_(mesh),
      store_(store),
      optimizer_(optimizer),
      sum_(sum),
      method_(method) {}

std::string Checkpoints::save(const TrainingState& state) {
  // Every tensor-parallel group gathers: simpler than choosing one, and all ranks make the same calls.
  const SavedAdapter adapter = collect_adapter(store_, method_, identity_, mesh_.tp());
  std::vector<std::pair<std::string, StateTensors>> groups;
  for (const auto& [group, flat] : state_buffers()) groups.emplace_back(group, store_.gather(flat, mesh_.tp()));
  groups.emplace_back(carried_group(mesh_), collect_carried(mesh_, sum_));
  std::string path;
  on_rank_0(mesh_.world(), [&] {
    path = free_checkpoint_path(storage_, folder_, state.step);
    try {
      write(path, state.step, adapter_h5_image(adapter), state_image(state, identity_.hash, groups));
    } catch (...) {
      drop(path);
      throw;
    }
    prune_checkpoints(storage_, folder_, identity_.hash, retention_, state.step);
  });
  return path;
}

std::vector<std::pair<std::string, at::Tensor>> Checkpoints::state_buffers() {
  std::vector<std::pair<std::string, at::Tensor>> buffers = method_.state();
  buffers.emplace_back("exp_avg", optimizer_.exp_avg());
  buffers.emplace_back("exp_avg_sq", optimizer_.exp_avg_sq());
  return buffers;
}

void Checkpoints::write(const std::string& path, int64_t step, const std::string& adapter,
                        const std::string& moments) const {
  storage_.make_folders(path);
  storage_.write_file(path + "/adapter.h5", adapter);
  storage_.write_file(path + "/state.h5", moments);
  const Manifest manifest{step, identity_.hash, {describe("adapter.h5", adapter), describe("state.h5", moments)}};
  storage_.write_file(path + "/manifest.json", manifest_json(manifest, identity_.base_model, identity_.libraries));
  storage_.sync_folder(folder_);
  std::string why;
  if (!verify_checkpoint(path, why)) throw StorageError(path + ": " + why + " right after it was written.");
}

void Checkpoints::drop(const std::string& path) const {
  try {
    storage_.remove(path);
  } catch (const StorageError&) {
    // Without a manifest it is no checkpoint, and the next save of its step removes it; with one it is whole.
  }
}

std::optional<std::string> Checkpoints::newest() {
  std::string found;
  passed_over_.clear();
  on_rank_0(mesh_.world(),
            [&] { found = newest_checkpoint(folder_, identity_.hash, passed_over_).value_or(std::string()); });
  found = broadcast_text(mesh_.world(), found);
  return found.empty() ? std::nullopt : std::optional(found);
}

TrainingState Checkpoints::load(const std::string& path) {
  on_each_rank(mesh_.world(), [&] {
    require_on_this_host(path, mesh_.world());
    require_checkpoint(path, identity_.hash);
  });
  const h5::Reader adapter(path + "/adapter.h5");
  std::set<std::string> own;
  for (const auto& p : store_.parameters()) {
    store_.load(p.spec.name, adapter.read(p.spec.name));
    own.insert(p.spec.name);
  }
  store_.refresh();
  StateTensors extra;
  for (const std::string& path_in_file : adapter.names()) {
    const std::string name = path_in_file.substr(path_in_file.find_first_not_of('/'));
    if (!own.count(name)) extra.emplace_back(name, adapter.read(name));
  }
  method_.take_extra(extra);
  const h5::Reader file(path + "/state.h5");
  const auto restore = [&](const std::string& group, const at::Tensor& flat) {
    for (const auto& p : store_.parameters()) {
      const at::Tensor part = store_.part_of(p, file.read(group + "/" + p.spec.name));
      flat.narrow(0, p.begin, p.master.numel()).view(p.master.sizes()).copy_(part);
    }
  };
  for (const auto& [group, flat] : state_buffers()) restore(group, flat);
  deal_carried(file, mesh_, sum_);
  method_.begin(mesh_);
  return {file.attribute_int("step"), {file.attribute_int("epoch"), file.attribute_int("sequence")}};
}

std::vector<std::string> Checkpoints::start_at(int64_t step) {
  std::vector<std::string> lines;
  on_rank_0(mesh_.world(), [&] { lines = set_aside_beyond(storage_, folder_, step); });
  return lines;
}

SavedAdapter collect_adapter(const ParameterStore& store, const AdapterMethod& method, const RunIdentity& identity,
                             Communicator& tp) {
  SavedAdapter file{identity.adapter, identity.base_model, store.gather(store.masters(), tp)};
  for (auto& entry : method.extra_tensors(tp)) file.tensors.push_back(std::move(entry));
  return file;
}

}  // namespace corank
