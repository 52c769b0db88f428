#include "data/weight_file.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "configs/error.h"
#include "configs/text.h"
#include "data/file.h"
#include "data/json_object.h"
#include "data/storage.h"
#include "data/strict_json.h"

namespace corank {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kMaxIndexBytes = int64_t{64} << 20;
constexpr size_t kMaxNamed = 20;
const char* const kSingle = "model.safetensors";
const char* const kWeightEndings[] = {".safetensors", ".bin", ".pt",      ".pth", ".gguf",
                                      ".onnx",        ".h5",  ".msgpack", ".ot",  ".index.json"};

/// The index names files of its own folder only.
bool good_shard(const std::string& name) {
  return name.ends_with(".safetensors") && name[0] != '.' && name.find('/') == std::string::npos &&
         name.find('\0') == std::string::npos;
}

bool lies_in(const fs::path& root, const fs::path& path) {
  return std::mismatch(root.begin(), root.end(), path.begin(), path.end()).first == root.end();
}

/// Where companions of a folder may lie: in it, or in the blobs of its cache (<model>/snapshots/<revision> holds links
/// into <model>/blobs).
std::vector<fs::path> companion_roots(const std::string& folder) {
  std::vector<fs::path> roots{fs::canonical(folder)};
  const fs::path snapshots = roots[0].parent_path();
  const fs::path blobs = snapshots.parent_path() / "blobs";
  if (snapshots.filename() == "snapshots" && fs::is_directory(fs::symlink_status(blobs))) roots.push_back(blobs);
  return roots;
}

/// tensor -> shard, as the index has it.
std::map<std::string, std::string> read_index(const std::string& path) {
  const nlohmann::json index = parse_json(read_file(path, kMaxIndexBytes), path);
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    throw InputError(path + ": has no weight_map; fetch the model again.");
  }
  std::map<std::string, std::string> shards;
  for (const auto& [tensor, shard] : index["weight_map"].items()) {
    if (!shard.is_string() || !good_shard(shard.get<std::string>())) {
      throw InputError(path + ": weight_map gives tensor " + shown(tensor) + " the file " + shown(shard) +
                       "; only names of .safetensors files beside the index are accepted.");
    }
    shards.emplace(tensor, shard.get<std::string>());
  }
  return shards;
}

}  // namespace

WeightFile::WeightFile(const std::string& folder) : folder_(folder) {
  const std::string single = folder + "/" + kSingle, index = folder + "/" + kWeightIndex;
  if (!fs::is_directory(folder)) {
    throw MissingError(folder + ": the model folder does not exist; give a folder in Hugging Face format.");
  }
  if (!fs::exists(single) && !fs::exists(index)) {
    throw MissingError(folder + ": holds neither " + kSingle + " nor " + kWeightIndex +
                       "; weights in other formats (.bin, .gguf) must be converted to safetensors first.");
  }
  if (fs::exists(single) && fs::exists(index)) {
    throw InputError(folder + ": holds both " + kSingle + " and " + kWeightIndex +
                     ", and which one counts cannot be told; remove one.");
  }
  if (fs::exists(index)) {
    open_shards(index);
    return;
  }
  files_.push_back(std::make_unique<SafetensorsFile>(single));
  for (const auto& [name, info] : files_[0]->tensors()) where_.emplace(name, 0);
}

void WeightFile::open_shards(const std::string& index_path) {
  std::map<std::string, size_t> opened;
  for (const auto& [tensor, shard] : read_index(index_path)) {
    const auto [entry, is_new] = opened.emplace(shard, files_.size());
    if (is_new) files_.push_back(std::make_unique<SafetensorsFile>(folder_ + "/" + shard));
    if (!files_[entry->second]->tensors().contains(tensor)) {
      throw InputError(index_path + ": says that tensor " + shown(tensor) + " is in " + shard +
                       ", which does not hold it; fetch the model again.");
    }
    where_.emplace(tensor, entry->second);
  }
  for (const auto& [shard, number] : opened) {
    for (const auto& [tensor, info] : files_[number]->tensors()) {
      const auto found = where_.find(tensor);
      if (found == where_.end() || found->second != number) {
        throw InputError(folder_ + "/" + shard + ": holds tensor " + tensor + ", which " + kWeightIndex +
                         (found == where_.end() ? " does not name" : " places in another file") +
                         "; fetch the model again.");
      }
    }
  }
}

const SafetensorsFile& WeightFile::file_of(const std::string& name) const {
  const auto found = where_.find(name);
  if (found == where_.end()) {
    throw InputError(folder_ + ": the weights have no tensor " + name + "; the model does not fit its config.json.");
  }
  return *files_[found->second];
}

std::vector<std::string> WeightFile::names() const {
  std::vector<std::string> result;
  for (const auto& [name, file] : where_) result.push_back(name);
  return result;
}

const TensorInfo& WeightFile::info(const std::string& name) const { return file_of(name).info(name); }

at::Tensor WeightFile::read(const std::string& name) {
  const SafetensorsFile& file = file_of(name);
  used_.insert(name);
  return file.read(name);
}

at::Tensor WeightFile::read_slice(const std::string& name, int64_t dim, int64_t start, int64_t length) {
  const SafetensorsFile& file = file_of(name);
  used_.insert(name);
  return file.read_slice(name, dim, start, length);
}

void WeightFile::require_floating(const std::string& name) const {
  const at::ScalarType dtype = info(name).dtype;
  if (at::isFloatingType(dtype)) return;
  throw InputError(file_of(name).path() + ": tensor " + name + " holds " + c10::toString(dtype) +
                   " values, and the model needs floating ones. Take the model in 16 or 32 bits.");
}

void WeightFile::require_finite(const std::string& name, const at::Tensor& values) const {
  if (values.numel() == 0) return;
  const auto [least, most] = at::aminmax(values);  // NaN if any value is
  if (std::isfinite(least.item<double>()) && std::isfinite(most.item<double>())) return;
  throw InputError(file_of(name).path() + ": tensor " + name +
                   " holds NaN or infinite values. The file is damaged or the model diverged; fetch it again.");
}

void WeightFile::require_all_used() const {
  std::string unused;
  size_t count = 0;
  for (const auto& [name, file] : where_) {
    if (used_.contains(name)) continue;
    if (++count <= kMaxNamed) unused += (count == 1 ? "" : ", ") + name;
  }
  if (count == 0) return;
  throw InputError(folder_ + ": " + std::to_string(count) + " tensors have no place in the model of its config.json: " +
                   unused + (count > kMaxNamed ? ", ..." : "") +
                   ". A model that ignores weights is another model: check that config.json belongs to them.");
}

int64_t WeightFile::bytes_read() const {
  int64_t sum = 0;
  for (const auto& file : files_) sum += file->bytes_read();
  return sum;
}

void copy_companions(Storage& storage, const std::string& from, const std::string& to) {
  const std::vector<fs::path> roots = companion_roots(from);
  for (const auto& entry : fs::directory_iterator(from)) {
    const std::string name = entry.path().filename().string();
    const bool weights = std::any_of(std::begin(kWeightEndings), std::end(kWeightEndings),
                                     [&](const char* ending) { return name.ends_with(ending); });
    std::error_code error;
    if (!entry.is_regular_file(error) || weights || name == "config.json" || name == "adapter_config.json") continue;
    const fs::path target = fs::canonical(entry.path());
    if (std::any_of(roots.begin(), roots.end(), [&](const fs::path& root) { return lies_in(root, target); })) {
      storage.copy_file(target.string(), to + "/" + name);
    } else {
      spdlog::warn("{}: {} is a symbolic link out of the model folder, so it is not copied. Copy the file itself.",
                   printable(from), shown_key(name));
    }
  }
}

}  // namespace corank
