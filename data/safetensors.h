#pragma once
#include <ATen/ATen.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace corank {

/// What a safetensors header says of one tensor.
struct TensorInfo {
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  int64_t begin = 0;  ///< byte offset in the file
  int64_t bytes = 0;
};

/// One safetensors file, read lazily with pread: only what is asked for leaves the disk. The header is checked strictly
/// (size limits, no duplicate keys, no holes or overlaps, sizes that fit shapes, end of data = end of file):
/// InputError. Types: F64 F32 BF16 F16 I64 I32 I8 U8 BOOL. Names: letters, digits, '.', '_' and '-'. Thread-safe for
/// reads.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::string& path);  // MissingError, InputError
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::string& path() const { return path_; }
  const std::map<std::string, TensorInfo>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  /// InputError if the file has no such tensor.
  const TensorInfo& info(const std::string& name) const;
  /// A whole tensor as a new CPU tensor.
  at::Tensor read(const std::string& name) const;
  /// Indices [start, start + length) of dimension `dim`, reading only those bytes.
  at::Tensor read_slice(const std::string& name, int64_t dim, int64_t start, int64_t length) const;
  /// Bytes read from tensor data so far (a test holds it against what the shard needs).
  int64_t bytes_read() const { return bytes_read_; }

 private:
  void read_header();
  void read_bytes(int64_t offset, int64_t size, char* to) const;

  std::string path_;
  int fd_;
  std::map<std::string, TensorInfo> tensors_;
  std::map<std::string, std::string> metadata_;
  mutable std::atomic<int64_t> bytes_read_ = 0;
};

/// The head of a safetensors file (length and padded JSON) for tensors whose data follow in the given order without
/// gaps; of each info only dtype and shape count. For files written in pieces. InternalError for a type or name that
/// SafetensorsFile would refuse.
std::string safetensors_header(const std::vector<std::pair<std::string, TensorInfo>>& tensors,
                               const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

/// A safetensors file image. Tensors are laid out in the given order; the header is padded with blanks to 8 bytes.
/// Tensors: CPU or CUDA, any stride; written contiguous in their own dtype.
std::string safetensors_image(const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                              const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

}  // namespace corank
