#pragma once
#include <ATen/ATen.h>

#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "data/safetensors.h"

namespace corank {

class Storage;

/// The named tensors of a Hugging Face folder: `model.safetensors`, or `model.safetensors.index.json` and its shards.
/// Loads lazily; each rank reads only the byte ranges it asks for. Not thread-safe.
class WeightFile {
 public:
  /// MissingError if the folder or its files are absent; InputError if index and shards contradict each other.
  explicit WeightFile(const std::string& folder);

  bool has(const std::string& name) const { return where_.count(name) != 0; }
  std::vector<std::string> names() const;
  /// InputError if the files have no such tensor; so do the two below.
  const TensorInfo& info(const std::string& name) const;
  /// Both mark the name as used. Results are CPU tensors in the stored dtype.
  at::Tensor read(const std::string& name);
  at::Tensor read_slice(const std::string& name, int64_t dim, int64_t start, int64_t length);
  /// InputError that names the tensor and its file, unless it is of a floating type.
  void require_floating(const std::string& name) const;
  /// InputError that names the tensor and its file, unless all of these values of it are finite.
  void require_finite(const std::string& name, const at::Tensor& values) const;
  /// Marks a name that is known and deliberately not read (a tied head, say).
  void mark_used(const std::string& name) { used_.insert(name); }
  /// InputError naming every tensor of the files that nothing read: an ignored weight is a wrong model.
  void require_all_used() const;
  int64_t bytes_read() const;
  /// The files that hold the tensors: one, or every shard of the index.
  const std::vector<std::unique_ptr<SafetensorsFile>>& files() const { return files_; }
  const std::string& folder() const { return folder_; }

 private:
  const SafetensorsFile& file_of(const std::string& name) const;
  void open_shards(const std::string& index_path);
  std::string folder_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, size_t> where_;
  std::set<std::string> used_;
};

inline constexpr const char* kWeightIndex = "model.safetensors.index.json";

/// Copies what a model folder holds beside config.json and weights (tokenizer, templates, licence), each file
/// atomically and in pieces. Weights of any format and an adapter's configuration stay behind: they would not be those
/// of `to`. So does what is no regular file, and a symbolic link whose target lies neither in the folder nor in the
/// blobs of the Hugging Face cache that it is a snapshot of; the log names it.
void copy_companions(Storage& storage, const std::string& from, const std::string& to);

}  // namespace corank
