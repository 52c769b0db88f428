#include "data/file.h"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "configs/error.h"

namespace corank {
namespace {

constexpr size_t kBlockBytes = size_t{1} << 20;

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
  static std::string reason() { return std::generic_category().message(errno); }

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
  Sha256 hash;
  read_blocks(path, [&](std::string_view block) { hash.update(block); });
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

void read_blocks(const std::string& path, const std::function<void(std::string_view block)>& take) {
  Input input(path);
  std::string block(kBlockBytes, '\0');
  while (const size_t count = input.read(block.data(), block.size())) take({block.data(), count});
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
