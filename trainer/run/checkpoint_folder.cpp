#include "trainer/run/checkpoint_folder.h"

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "configs/error.h"
#include "configs/text.h"
#include "data/file.h"
#include "data/h5.h"
#include "data/json_object.h"
#include "data/storage.h"

namespace corank {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* kManifestFormat = "corank-checkpoint";
constexpr int64_t kManifestVersion = 1;
constexpr const char* kFolderPrefix = "checkpoint-";
constexpr const char* kPruned = "pruned-";  // on its way out, under a name that is no checkpoint's
constexpr const char* kSetAside = "set-aside";
constexpr int64_t kMaxManifestBytes = int64_t{1} << 20;

std::string path_of(const std::string& folder, int64_t step) {
  return fmt::format("{}/{}{}", folder, kFolderPrefix, step);
}

/// The step of a folder named checkpoint-<step>.
std::optional<int64_t> step_in_name(const std::string& path) {
  const fs::path normal = fs::path(path).lexically_normal();
  const std::string name = (normal.has_filename() ? normal : normal.parent_path()).filename().string();
  const std::string prefix = kFolderPrefix;
  if (!name.starts_with(prefix)) return std::nullopt;
  const std::string digits = name.substr(prefix.size());
  if (digits.empty() || digits.size() > 18 || digits.find_first_not_of("0123456789") != std::string::npos)
    return std::nullopt;
  const int64_t step = std::stoll(digits);
  return name == kFolderPrefix + std::to_string(step) ? std::optional(step) : std::nullopt;
}

/// Steps of the folders named checkpoint-<step> in `folder`, newest first; whole or not.
std::vector<int64_t> checkpoint_steps(const std::string& folder) {
  std::vector<int64_t> steps;
  if (!fs::is_directory(folder)) return steps;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (const auto step = step_in_name(entry.path().string())) steps.push_back(*step);
  }
  std::sort(steps.rbegin(), steps.rend());
  return steps;
}

bool has_manifest(const std::string& path) {
  std::error_code ignored;
  return fs::exists(path + "/manifest.json", ignored);
}

/// Of everything else in the object, however it is laid out.
std::string hash_of(json manifest) {
  manifest.erase("sha256");
  return sha256(manifest.dump());
}

void require(bool holds, const std::string& what) {
  if (!holds) throw InputError(what);
}

Manifest parse_manifest(const std::string& text) {
  const JsonObject object(text, "manifest.json");
  const auto hash = object.get_optional<std::string>("sha256");
  require(!hash || *hash == hash_of(object.root()), "manifest.json is not what was written");
  require(object.get<std::string>("format") == kManifestFormat && object.get<int64_t>("version") == kManifestVersion,
          fmt::format("manifest.json is not of the format {} in version {}", kManifestFormat, kManifestVersion));
  Manifest manifest{object.get<int64_t>("step"), object.get<std::string>("identity"), {}};
  const auto files = object.get<JsonObject>("files");
  for (const char* name : {"adapter.h5", "state.h5"}) {
    const auto file = files.get<JsonObject>(name);
    manifest.files.push_back({name, file.get<int64_t>("bytes"), file.get<std::string>("sha256")});
  }
  return manifest;
}

/// manifest.json, with the step that the folder's name gives. InputError, MissingError.
Manifest read_manifest(const std::string& path) {
  require(has_manifest(path), "manifest.json is missing");
  Manifest manifest = parse_manifest(read_file(path + "/manifest.json", kMaxManifestBytes));
  const int64_t named = step_in_name(path).value_or(manifest.step);
  require(named == manifest.step,
          fmt::format("manifest.json is of step {}, not of the step in the folder's name", manifest.step));
  return manifest;
}

bool has_size(const std::string& path, int64_t bytes) {
  std::error_code failed;
  const uintmax_t size = fs::file_size(path, failed);
  return !failed && size == static_cast<uintmax_t>(bytes);
}

void check_files(const std::string& path, const Manifest& manifest) {
  for (const Manifest::File& file : manifest.files) {
    const std::string place = path + "/" + file.name;
    require(has_size(place, file.bytes) && sha256_of_file(place) == file.sha256,
            file.name + " is missing or not what manifest.json describes");
  }
  const h5::Reader state(path + "/state.h5");
  require(state.attribute_int("step") == manifest.step && state.attribute_string("identity") == manifest.identity,
          "state.h5 and manifest.json are not of one step and run");
}

/// What `read` gives; nullopt, with the reason in `why`, where it refuses.
template <class Read>
std::optional<Manifest> unless_refused(const Read& read, std::string& why) {
  try {
    return read();
  } catch (const InputError& e) {
    why = e.what();
  } catch (const MissingError& e) {
    why = e.what();
  }
  if (why.ends_with('.')) why.pop_back();
  return std::nullopt;
}

/// Tidies up for a run, which goes on where that is not possible.
template <class Action>
void tidy(const Action& action) {
  try {
    action();
  } catch (const StorageError& e) {
    spdlog::warn("{} It stays there; remove it by hand.", printable(e.what()));
  }
}

/// Whether the checkpoint counts for the run's save_total_limit.
bool counts(const std::string& path, const std::string& identity) {
  std::string why;
  const auto manifest = unless_refused([&] { return read_manifest(path); }, why);
  return manifest && manifest->identity == identity &&
         std::all_of(manifest->files.begin(), manifest->files.end(),
                     [&](const Manifest::File& file) { return has_size(path + "/" + file.name, file.bytes); });
}

/// Moves the checkpoint of `step` to where none is looked for, and returns the place.
std::string set_aside(Storage& storage, const std::string& folder, int64_t step) {
  const std::string place = fmt::format("{}/{}", folder, kSetAside);
  storage.make_folders(place);
  std::string aside = path_of(place, step);
  for (int n = 2; fs::exists(fs::symlink_status(aside)); ++n) aside = fmt::format("{}.{}", path_of(place, step), n);
  storage.rename(path_of(folder, step), aside);
  return aside;
}

}  // namespace

std::string manifest_json(const Manifest& manifest, const std::string& base_model,
                          const std::map<std::string, std::string>& libraries) {
  json files;
  for (const Manifest::File& file : manifest.files) {
    files[file.name] = {{"bytes", file.bytes}, {"sha256", file.sha256}};
  }
  json object{{"format", kManifestFormat},
              {"version", kManifestVersion},
              {"step", manifest.step},
              {"identity", manifest.identity},
              {"files", files},
              {"base_model", base_model},
              {"libraries", libraries}};
  object["sha256"] = hash_of(object);
  return object.dump(2) + "\n";
}

std::optional<Manifest> verify_checkpoint(const std::string& path, std::string& why) {
  return unless_refused(
      [&] {
        const Manifest manifest = read_manifest(path);
        check_files(path, manifest);
        return manifest;
      },
      why);
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
                      "Choose another output_dir, or resume: never, which sets them aside.",
                      folder));
    }
    any_completed |= has_manifest(path);
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
  if (!manifest) throw InputError(fmt::format("resume: {}: not a complete checkpoint: {}.", path, why));
  if (manifest->identity != identity) {
    throw ConfigError(fmt::format("resume: {} was made by another run (other settings or data).", path));
  }
}

std::string free_checkpoint_path(Storage& storage, const std::string& folder, int64_t step) {
  const std::string path = path_of(folder, step);
  if (has_manifest(path)) {
    set_aside(storage, folder, step);
  } else {
    storage.remove(path);
  }
  return path;
}

std::vector<std::string> set_aside_beyond(Storage& storage, const std::string& folder, int64_t step) {
  std::vector<std::string> lines;
  for (const int64_t other : checkpoint_steps(folder)) {
    const std::string path = path_of(folder, other);
    if (other <= step || !has_manifest(path)) continue;
    lines.push_back(
        fmt::format("{} lies ahead of step {}: set aside as {}", path, step, set_aside(storage, folder, other)));
  }
  return lines;
}

void prune_checkpoints(Storage& storage, const std::string& folder, const std::string& identity,
                       const Retention& retention, int64_t just_written) {
  const fs::path also = retention.also.empty() ? fs::path() : fs::weakly_canonical(retention.also);
  int64_t kept = 0;
  for (const int64_t step : checkpoint_steps(folder)) {
    const std::string path = path_of(folder, step);
    if (fs::weakly_canonical(path) == also || !counts(path, identity)) continue;
    if (++kept <= retention.limit || step == just_written) continue;
    const std::string leaving = fmt::format("{}/{}{}{}", folder, kPruned, kFolderPrefix, step);
    tidy([&] {
      storage.remove(leaving);
      storage.rename(path, leaving);
      storage.remove(leaving);
    });
  }
}

void remove_leftovers(Storage& storage, const std::string& folder) {
  remove_temporaries(storage, folder);
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (!fs::is_directory(entry.symlink_status())) continue;
    if (name.starts_with(kPruned) && step_in_name(name.substr(std::string(kPruned).size()))) {
      tidy([&] { storage.remove(entry.path().string()); });
    } else if (name == "adapter" || name == "model" || step_in_name(name)) {
      tidy([&] { remove_temporaries(storage, entry.path().string()); });
    }
  }
}

}  // namespace corank
