#pragma once
#include <ATen/ATen.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

/// HDF5 as corank uses it. HDF5 itself is called nowhere else: it keeps process-wide state and is not thread-safe, so
/// every function here holds one process-wide lock. Objects may be used from any thread, one thread at a time each.
///
/// Tensors are of type int32, int64, uint8, float32 or float64, little-endian in the file.
namespace corank::h5 {

/// A file open for reading. Refused with InputError where they are met: soft and external links, virtual or external
/// storage, filters other than Fletcher32, data that is declared but not stored, other types, checksums that do not
/// match, a file that changes while it is open.
class Reader {
 public:
  /// MissingError if `path` does not exist; InputError if it is not a sound HDF5 file.
  explicit Reader(const std::string& path);
  /// Reads a file image in memory (whose hash the caller has checked); `origin` stands for the path in messages.
  Reader(std::string image, std::string origin);
  ~Reader();
  Reader(Reader&& other) noexcept;

  bool has(const std::string& name) const;
  std::vector<std::string> names(const std::string& group = "/") const;  ///< datasets below `group`, sorted, full names
  std::vector<int64_t> shape(const std::string& name) const;
  at::ScalarType dtype(const std::string& name) const;
  /// A whole dataset as a new CPU tensor in its own type.
  at::Tensor read(const std::string& name) const;
  /// Elements [begin, end) of a one-dimensional dataset.
  at::Tensor read_range(const std::string& name, int64_t begin, int64_t end) const;
  /// Attributes of the root group.
  bool has_attribute(const std::string& name) const;
  std::string attribute_string(const std::string& name) const;
  int64_t attribute_int(const std::string& name) const;
  const std::string& origin() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Builds a file in memory; the caller writes the image. Equal calls in equal order give equal bytes, and a flipped bit
/// is noticed by Reader. InternalError for a name used twice or a tensor that cannot be stored.
class Writer {
 public:
  Writer();
  ~Writer();
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;

  /// Chunked with a Fletcher32 checksum (a scalar or an empty tensor stands in its checksummed header). CPU,
  /// contiguous. Slashes in names make groups.
  void write(const std::string& name, const at::Tensor& tensor);
  /// Attributes of the root group; strings without NUL.
  void attribute(const std::string& name, const std::string& value);
  void attribute(const std::string& name, int64_t value);
  /// Closes the file and hands over its bytes. Nothing may be called after it.
  std::string finish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace corank::h5
