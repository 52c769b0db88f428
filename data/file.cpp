#include "data/file.h"

#include <fcntl.h>
#include <openssl/evp.h>
#include <spdlog/spdlog.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "configs/error.h"
#include "configs/text.h"

namespace corank {
namespace {

constexpr size_t kBlockBytes = size_t{1} << 20;
constexpr int kTemporaryNames = 100;
constexpr const char* kTemporaryEnd = ".tmp";

std::string reason() { return std::generic_category().message(errno); }

[[noreturn]] void fail_storage(const std::string& path, const std::string& what) {
  throw StorageError(path + ": " + what + ": " + reason() + ". Check the free space, the permissions and the disk.");
}

/// <name>.<process id>-<i>.tmp, as AtomicFile makes it.
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
  const std::string folder = std::filesystem::path(path).parent_path().string();
  return folder.empty() ? "." : folder;
}

/// An open file descriptor for reading.
class Input {
 public:
  // Without O_NONBLOCK the opening of a pipe would wait for its writer.
  explicit Input(const std::string& path) : path_(path), fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
    struct stat status {};
    if (fd_ >= 0 && ::fstat(fd_, &status) == 0 && (S_ISDIR(status.st_mode) || S_ISFIFO(status.st_mode))) {
      ::close(fd_);
      throw MissingError(path + ": is a folder or a pipe, and a file is needed here; name a file.");
    }
    if (fd_ < 0) throw MissingError(path + ": cannot be opened: " + reason() + ". Check the path and its permissions.");
    size_ = static_cast<int64_t>(status.st_size);
  }
  ~Input() { ::close(fd_); }
  Input(const Input&) = delete;
  Input& operator=(const Input&) = delete;

  int64_t size() const { return size_; }
  /// Reads up to `size` bytes; 0 at the end of the file.
  size_t read(char* buffer, size_t size) {
    for (;;) {
      const ssize_t count = ::read(fd_, buffer, size);
      if (count >= 0) return static_cast<size_t>(count);
      if (errno != EINTR) throw InputError(path_ + ": cannot be read: " + reason() + ". Check the disk.");
    }
  }

 private:
  std::string path_;
  int fd_;
  int64_t size_ = 0;
};

}  // namespace

Sha256::Sha256() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
  if (!context_ || EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) != 1) {
    throw InternalError("OpenSSL offers no SHA-256.");
  }
}

void Sha256::update(std::string_view bytes) {
  if (EVP_DigestUpdate(context_.get(), bytes.data(), bytes.size()) != 1) throw InternalError("SHA-256 failed.");
}

std::string Sha256::hex() {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned length = 0;
  if (EVP_DigestFinal_ex(context_.get(), digest, &length) != 1) throw InternalError("SHA-256 failed.");
  std::string text;
  for (unsigned i = 0; i < length; ++i) {
    text += "0123456789abcdef"[digest[i] >> 4];
    text += "0123456789abcdef"[digest[i] & 15];
  }
  return text;
}

std::string sha256(std::string_view bytes) {
  Sha256 hash;
  hash.update(bytes);
  return hash.hex();
}

std::string sha256_of_file(const std::string& path) {
  Input input(path);
  Sha256 hash;
  std::string block(kBlockBytes, '\0');
  while (const size_t count = input.read(block.data(), block.size())) hash.update({block.data(), count});
  return hash.hex();
}

std::string read_file(const std::string& path, int64_t limit) {
  Input input(path);
  // One byte more than the file has, so that its end is met without growing.
  std::string bytes(static_cast<size_t>(std::min(input.size(), limit)) + 1, '\0');
  size_t size = 0;
  for (;;) {
    if (size == bytes.size()) bytes.resize(std::max(2 * size, kBlockBytes));
    const size_t count = input.read(bytes.data() + size, bytes.size() - size);
    size += count;
    if (static_cast<int64_t>(size) > limit) {
      throw InputError(path + ": larger than " + std::to_string(limit) + " bytes, the most that is read here.");
    }
    if (count == 0) break;
  }
  bytes.resize(size);
  return bytes;
}

std::string write_file_atomically(const std::string& path, std::string_view bytes) {
  AtomicFile file(path);
  file.write(bytes);
  return file.commit();
}

std::string copy_file_atomically(const std::string& from, const std::string& to) {
  Input input(from);
  AtomicFile file(to);
  std::string block(kBlockBytes, '\0');
  while (const size_t count = input.read(block.data(), block.size())) file.write({block.data(), count});
  return file.commit();
}

AtomicFile::AtomicFile(const std::string& path) : path_(path) {
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

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) ::close(fd_);
  if (!temporary_.empty() && ::unlink(temporary_.c_str()) != 0) {
    spdlog::warn("{}: left behind, it cannot be removed: {}", printable(temporary_), reason());
  }
}

void AtomicFile::write(std::string_view bytes) {
  if (fd_ < 0) throw InternalError(path_ + ": written after commit.");
  hash_.update(bytes);
  while (!bytes.empty()) {
    const ssize_t count = ::write(fd_, bytes.data(), bytes.size());
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) fail_storage(temporary_, "cannot be written (" + std::to_string(bytes.size()) + " bytes to go)");
    bytes.remove_prefix(static_cast<size_t>(count));
  }
}

std::string AtomicFile::commit() {
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
  sync_folder(folder_of(path_));
  return digest;
}

void remove_temporaries(const std::string& folder) {
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const bool is_file = std::filesystem::is_regular_file(entry.symlink_status());
    if (is_file && is_temporary(entry.path().filename().string())) std::filesystem::remove(entry.path());
  }
}

void make_folders(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (!error && !std::filesystem::is_directory(path, error) && !error) {
    error = std::make_error_code(std::errc::not_a_directory);
  }
  if (error) {
    throw StorageError(path + ": the folder cannot be made: " + error.message() + ". Check the path and permissions.");
  }
}

void sync_folder(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) fail_storage(path, "the folder cannot be opened");
  const int result = ::fsync(fd);
  const int error = errno;
  ::close(fd);
  errno = error;
  if (result != 0) fail_storage(path, "the folder cannot be flushed to the disk");
}

AtomicFolder::AtomicFolder(const std::string& path) {
  namespace fs = std::filesystem;
  const fs::path place = fs::absolute(path).lexically_normal();
  path_ = (place.has_filename() ? place : place.parent_path()).string();
  partial_ = path_ + ".partial";
  make_folders(partial_);
  lock_ = std::make_unique<FolderLock>(partial_);
  for (const auto& entry : fs::directory_iterator(partial_)) {
    if (!entry.is_regular_file()) {
      throw StorageError(entry.path().string() + ": stands where " + path_ + " is to be prepared. Remove it.");
    }
    fs::remove(entry.path());
  }
}

AtomicFolder::~AtomicFolder() {
  std::error_code ignored;
  if (lock_) std::filesystem::remove_all(partial_, ignored);
}

void AtomicFolder::commit() {
  sync_folder(partial_);
  if (::rename(partial_.c_str(), path_.c_str()) != 0) fail_storage(path_, "cannot be renamed from " + partial_);
  sync_folder(folder_of(path_));
  lock_ = nullptr;
}

FolderLock::FolderLock(const std::string& folder) : fd_(open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
  if (fd_ >= 0 && flock(fd_, LOCK_EX | LOCK_NB) == 0) return;
  const int reason = errno;
  if (fd_ >= 0) close(fd_);
  if (reason == EWOULDBLOCK) {
    throw ConfigError(folder + ": another process is writing this folder. Wait for it, stop it, or choose another.");
  }
  throw StorageError(folder + ": cannot be locked: " + std::strerror(reason) + ".");
}

FolderLock::~FolderLock() { close(fd_); }

}  // namespace corank
