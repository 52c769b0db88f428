#include "data/storage.h"

#include <fcntl.h>
#include <spdlog/spdlog.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <system_error>
#include <utility>

#include "configs/error.h"
#include "configs/text.h"
#include "data/file.h"

namespace corank {
namespace {

namespace fs = std::filesystem;

constexpr int kTemporaryNames = 100;
constexpr const char* kTemporaryEnd = ".tmp";

std::string last_reason() { return std::generic_category().message(errno); }

[[noreturn]] void fail_storage(const std::string& path, const std::string& what, const std::string& reason) {
  throw StorageError(path + ": " + what + ": " + reason + ". Check the free space, the permissions and the disk.");
}
[[noreturn]] void fail_storage(const std::string& path, const std::string& what) {
  fail_storage(path, what, last_reason());
}

/// <name>.<process id>-<i>.tmp, as DiskFile makes it.
bool is_temporary(const std::string& name) {
  const std::string end = kTemporaryEnd;
  if (!name.ends_with(end)) return false;
  const std::string numbers = name.substr(0, name.size() - end.size());
  const size_t dot = numbers.rfind('.'), dash = numbers.rfind('-');
  const auto is_number = [](const std::string& text) {
    return !text.empty() && text.find_first_not_of("0123456789") == std::string::npos;
  };
  return dot != std::string::npos && dot > 0 && dash != std::string::npos && dash > dot &&
         is_number(numbers.substr(dot + 1, dash - dot - 1)) && is_number(numbers.substr(dash + 1));
}

std::string folder_of(const std::string& path) {
  const std::string folder = fs::path(path).parent_path().string();
  return folder.empty() ? "." : folder;
}

/// All of `bytes`, or StorageError.
void write_all(int fd, std::string_view bytes, const std::string& path) {
  while (!bytes.empty()) {
    const ssize_t count = ::write(fd, bytes.data(), bytes.size());
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) fail_storage(path, "cannot be written (" + std::to_string(bytes.size()) + " bytes to go)");
    bytes.remove_prefix(static_cast<size_t>(count));
  }
}

void flush_folder(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) fail_storage(path, "the folder cannot be opened");
  const int result = ::fsync(fd);
  const int error = errno;
  ::close(fd);
  errno = error;
  if (result != 0) fail_storage(path, "the folder cannot be flushed to the disk");
}

class DiskFile : public OutputFile {
 public:
  explicit DiskFile(const std::string& path) : path_(path) {
    struct stat status {};
    if (::stat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode)) {
      throw StorageError(path + ": exists and is no regular file, so it is not replaced. Choose another path.");
    }
    // A process that was killed may have left its name behind, and process ids come again.
    for (int i = 0; i < kTemporaryNames && fd_ < 0; ++i) {
      temporary_ = path + "." + std::to_string(::getpid()) + "-" + std::to_string(i) + kTemporaryEnd;
      fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666);
      if (fd_ < 0 && errno != EEXIST) break;
    }
    if (fd_ < 0) fail_storage(temporary_, "cannot be created");
  }

  ~DiskFile() override {
    if (fd_ >= 0) ::close(fd_);
    if (!temporary_.empty() && ::unlink(temporary_.c_str()) != 0) {
      spdlog::warn("{}: left behind, it cannot be removed: {}", printable(temporary_), last_reason());
    }
  }

  void write(std::string_view bytes) override {
    if (fd_ < 0) throw InternalError(path_ + ": written after commit.");
    hash_.update(bytes);
    write_all(fd_, bytes, temporary_);
  }

  std::string commit() override {
    if (fd_ < 0) throw InternalError(path_ + ": committed twice.");
    if (::fsync(fd_) != 0) fail_storage(temporary_, "cannot be flushed to the disk");
    if (::close(std::exchange(fd_, -1)) != 0) fail_storage(temporary_, "cannot be closed");
    const std::string digest = hash_.hex();
    if (sha256_of_file(temporary_) != digest) {
      throw StorageError(path_ +
                         ": reads back other bytes than were written; an older file stays as it is. "
                         "Check the disk.");
    }
    if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail_storage(path_, "cannot be renamed from " + temporary_);
    temporary_.clear();
    flush_folder(folder_of(path_));
    return digest;
  }

 private:
  std::string path_, temporary_;
  int fd_ = -1;
  Sha256 hash_;
};

}  // namespace

std::string Storage::write_file(const std::string& path, std::string_view bytes) {
  const auto file = create(path);
  file->write(bytes);
  return file->commit();
}

std::string Storage::copy_file(const std::string& from, const std::string& to) {
  const auto file = create(to);
  read_blocks(from, [&](std::string_view block) { file->write(block); });
  return file->commit();
}

std::unique_ptr<OutputFile> DiskStorage::create(const std::string& path) { return std::make_unique<DiskFile>(path); }

void DiskStorage::append(const std::string& path, std::string_view bytes) {
  const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (fd < 0) fail_storage(path, "cannot be opened");
  struct stat before {};
  const bool known = ::fstat(fd, &before) == 0;
  try {
    write_all(fd, bytes, path);
  } catch (...) {
    if (!known || ::ftruncate(fd, before.st_size) != 0) {
      spdlog::warn("{}: part of what was to be added may stand at its end: {}", printable(path), last_reason());
    }
    ::close(fd);
    throw;
  }
  if (::close(fd) != 0) fail_storage(path, "cannot be closed");
}

void DiskStorage::make_folders(const std::string& path) {
  std::error_code error;
  fs::create_directories(path, error);
  if (!error && !fs::is_directory(path, error) && !error) error = std::make_error_code(std::errc::not_a_directory);
  if (error) {
    throw StorageError(path + ": the folder cannot be made: " + error.message() + ". Check the path and permissions.");
  }
}

void DiskStorage::sync_folder(const std::string& path) { flush_folder(path); }

void DiskStorage::rename(const std::string& from, const std::string& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) fail_storage(to, "cannot be renamed from " + from);
}

void DiskStorage::remove(const std::string& path) {
  std::error_code error;
  fs::remove_all(path, error);
  if (error) fail_storage(path, "cannot be removed", error.message());
}

void remove_temporaries(Storage& storage, const std::string& folder) {
  for (const auto& entry : fs::directory_iterator(folder)) {
    const bool is_file = fs::is_regular_file(entry.symlink_status());
    if (is_file && is_temporary(entry.path().filename().string())) storage.remove(entry.path().string());
  }
}

AtomicFolder::AtomicFolder(Storage& storage, const std::string& path) : storage_(storage) {
  const fs::path place = fs::absolute(path).lexically_normal();
  path_ = (place.has_filename() ? place : place.parent_path()).string();
  partial_ = path_ + ".partial";
  storage_.make_folders(partial_);
  lock_ = std::make_unique<FolderLock>(partial_);
  for (const auto& entry : fs::directory_iterator(partial_)) {
    if (!entry.is_regular_file()) {
      throw StorageError(entry.path().string() + ": stands where " + path_ + " is to be prepared. Remove it.");
    }
    storage_.remove(entry.path().string());
  }
}

AtomicFolder::~AtomicFolder() {
  if (!lock_) return;
  try {
    storage_.remove(partial_);
  } catch (const StorageError& error) {
    spdlog::warn("{} It stays there; remove it by hand.", printable(error.what()));
  }
}

void AtomicFolder::commit() {
  storage_.sync_folder(partial_);
  storage_.rename(partial_, path_);
  storage_.sync_folder(folder_of(path_));
  lock_ = nullptr;
}

}  // namespace corank
