#pragma once
#include <cstdint>
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

/// The only way corank writes results and checkpoints: aside, fsync, read back and compare, rename, fsync of the
/// folder. A crash leaves the old file or the new one, never a mixture. Returns the SHA-256 of the file. Throws
/// StorageError.
std::string write_file_atomically(const std::string& path, std::string_view bytes);

/// The same with the bytes of another file, of which little is held at a time. MissingError, InputError for `from`.
std::string copy_file_atomically(const std::string& from, const std::string& to);

/// The same for a file written in pieces (merged models, safetensors): `write` to the end, then `commit`. Destroyed
/// without commit, or after an error, nothing is left behind and an older file stays as it is. Throws StorageError.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  void write(std::string_view bytes);
  /// Returns the SHA-256 of the file.
  std::string commit();

 private:
  std::string path_, temporary_;
  int fd_ = -1;
  Sha256 hash_;
};

/// Removes from `folder` what killed processes left of the two above. Only while no other process writes there.
void remove_temporaries(const std::string& folder);

class FolderLock;

/// A folder that appears complete or not at all: filled beside its place, as <path>.partial, and renamed by `commit`.
/// What an interrupted process left there is removed by the next one that writes the same folder. StorageError, or
/// ConfigError while another process fills it.
class AtomicFolder {
 public:
  /// `path` must not exist, or be an empty folder.
  explicit AtomicFolder(const std::string& path);
  ~AtomicFolder();
  AtomicFolder(const AtomicFolder&) = delete;
  AtomicFolder& operator=(const AtomicFolder&) = delete;
  /// Where to write files until commit.
  const std::string& path() const { return partial_; }
  void commit();

 private:
  std::string path_, partial_;
  std::unique_ptr<FolderLock> lock_;
};

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

/// mkdir -p; StorageError on failure.
void make_folders(const std::string& path);
/// fsync of a folder, so that a rename inside it is durable. StorageError on failure.
void sync_folder(const std::string& path);

}  // namespace corank
