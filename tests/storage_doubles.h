#pragma once
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "data/storage.h"

namespace corank::test {

/// One call of a Storage, or of an OutputFile that it made.
struct StorageOperation {
  std::string kind;  ///< the function's name
  std::string path;  ///< of a rename where to
  std::string from;  ///< of a rename
};

/// Shows every operation before the storage below does it: to count, to record, and, by throwing, to fail it. Borrows
/// the storage, and outlives its files.
class WatchedStorage : public Storage {
 public:
  using Watch = std::function<void(const StorageOperation&)>;
  WatchedStorage(Storage& below, Watch before) : below_(below), before_(std::move(before)) {}

  std::unique_ptr<OutputFile> create(const std::string& path) override {
    before_({"create", path, ""});
    return std::make_unique<File>(*this, path, below_.create(path));
  }
  void append(const std::string& path, std::string_view bytes) override {
    before_({"append", path, ""});
    below_.append(path, bytes);
  }
  void make_folders(const std::string& path) override {
    before_({"make_folders", path, ""});
    below_.make_folders(path);
  }
  void sync_folder(const std::string& path) override {
    before_({"sync_folder", path, ""});
    below_.sync_folder(path);
  }
  void rename(const std::string& from, const std::string& to) override {
    before_({"rename", to, from});
    below_.rename(from, to);
  }
  void remove(const std::string& path) override {
    before_({"remove", path, ""});
    below_.remove(path);
  }

 private:
  class File : public OutputFile {
   public:
    File(WatchedStorage& storage, std::string path, std::unique_ptr<OutputFile> below)
        : storage_(storage), path_(std::move(path)), below_(std::move(below)) {}
    void write(std::string_view bytes) override {
      storage_.before_({"write", path_, ""});
      below_->write(bytes);
    }
    std::string commit() override {
      storage_.before_({"commit", path_, ""});
      return below_->commit();
    }

   private:
    WatchedStorage& storage_;
    std::string path_;
    std::unique_ptr<OutputFile> below_;
  };

  Storage& below_;
  Watch before_;
};

}  // namespace corank::test
