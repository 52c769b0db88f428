#pragma once
#include <memory>
#include <string>
#include <string_view>

namespace corank {

/// A file in the making: nothing stands under its name before commit(). Destroyed without it, or after an error, it
/// leaves nothing behind, and an older file stays as it is. StorageError.
class OutputFile {
 public:
  virtual ~OutputFile() = default;
  virtual void write(std::string_view bytes) = 0;
  /// The file stands under its name, is durable and was read back. Returns its SHA-256. Nothing may be called after it.
  virtual std::string commit() = 0;
};

/// The one way to the disk of all that corank leaves: results, checkpoints, metrics, adapters, merged models. Whoever
/// writes is handed one, so that a test can count, record and fail each operation. Reading and locks go past it. Every
/// function throws StorageError.
class Storage {
 public:
  virtual ~Storage() = default;
  /// A new file at `path`, or one that takes the place of the file there. Its folder exists.
  virtual std::unique_ptr<OutputFile> create(const std::string& path) = 0;
  /// Adds to the end of the file at `path`: all of `bytes` or, where that fails, none. Not durable by itself.
  virtual void append(const std::string& path, std::string_view bytes) = 0;
  /// mkdir -p.
  virtual void make_folders(const std::string& path) = 0;
  /// What was renamed and removed in the folder is durable.
  virtual void sync_folder(const std::string& path) = 0;
  virtual void rename(const std::string& from, const std::string& to) = 0;
  /// A file, or a folder with everything in it. Nothing there is nothing to do.
  virtual void remove(const std::string& path) = 0;

  /// A file of these bytes through create(). Returns its SHA-256.
  std::string write_file(const std::string& path, std::string_view bytes);
  /// The same of another file's bytes, of which little is held at a time. MissingError, InputError for `from`.
  std::string copy_file(const std::string& from, const std::string& to);
};

/// The file system. Files are written aside, flushed, read back, compared and renamed: a crash leaves the old file or
/// the new one, never a mixture.
class DiskStorage : public Storage {
 public:
  std::unique_ptr<OutputFile> create(const std::string& path) override;
  void append(const std::string& path, std::string_view bytes) override;
  void make_folders(const std::string& path) override;
  void sync_folder(const std::string& path) override;
  void rename(const std::string& from, const std::string& to) override;
  void remove(const std::string& path) override;
};

/// Removes from `folder` what killed processes left of files in the making. Only while no other process writes there.
void remove_temporaries(Storage& storage, const std::string& folder);

class FolderLock;

/// A folder that appears complete or not at all: filled beside its place, as <path>.partial, and renamed by `commit`.
/// What an interrupted process left there is removed by the next one that writes the same folder. Borrows the storage.
/// StorageError, or ConfigError while another process fills it.
class AtomicFolder {
 public:
  /// `path` must not exist, or be an empty folder.
  AtomicFolder(Storage& storage, const std::string& path);
  ~AtomicFolder();
  AtomicFolder(const AtomicFolder&) = delete;
  AtomicFolder& operator=(const AtomicFolder&) = delete;
  /// Where to write files until commit.
  const std::string& path() const { return partial_; }
  void commit();

 private:
  Storage& storage_;
  std::string path_, partial_;
  std::unique_ptr<FolderLock> lock_;
};

}  // namespace corank
