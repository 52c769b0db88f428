#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

struct evp_md_ctx_st;

namespace corank {

/// Running SHA-256 (FIPS 180-4, OpenSSL).
class Sha256 {
 public:
  Sha256();
  void update(std::string_view bytes);
  /// Lower-case hexadecimal digest of everything so far; no update after it.
  std::string hex();

 private:
  std::unique_ptr<evp_md_ctx_st, void (*)(evp_md_ctx_st*)> context_;
};

std::string sha256(std::string_view bytes);
/// MissingError if the file does not exist.
std::string sha256_of_file(const std::string& path);

/// Reads a whole file. MissingError if it does not exist, InputError if it is larger than `limit` bytes.
std::string read_file(const std::string& path, int64_t limit = int64_t{1} << 40);

/// Hands the bytes of a file to `take`, a block at a time. MissingError, InputError.
void read_blocks(const std::string& path, const std::function<void(std::string_view block)>& take);

/// Holds a folder for one process: flock on the folder itself, so that nothing is left behind. ConfigError if another
/// process holds it. Released with the object or the process.
class FolderLock {
 public:
  explicit FolderLock(const std::string& folder);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  int fd_;
};

}  // namespace corank
