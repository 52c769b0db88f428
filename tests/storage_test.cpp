#include "data/storage.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>

#include "configs/error.h"
#include "data/file.h"

namespace corank {
namespace {

namespace fs = std::filesystem;

class Disk : public testing::Test {
 protected:
  void SetUp() override { fs::create_directories(folder_); }
  void TearDown() override { fs::remove_all(folder_); }
  size_t num_files() const {
    return static_cast<size_t>(std::distance(fs::directory_iterator(folder_), fs::directory_iterator()));
  }
  const std::string folder_ = testing::TempDir() + "corank_disk_" + std::to_string(getpid());
  const std::string path_ = folder_ + "/result.bin";
  DiskStorage disk_;
};

/// Writes beyond `bytes` fail while it lives, as on a full disk.
class SmallDisk {
 public:
  explicit SmallDisk(rlim_t bytes) {
    std::signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit small{bytes, before_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &small);
  }
  ~SmallDisk() { setrlimit(RLIMIT_FSIZE, &before_); }

 private:
  rlimit before_{};
};

TEST_F(Disk, WritesAndReads) {
  std::string bytes;
  for (int i = 0; i < 3'000'000; ++i) bytes += static_cast<char>(i * 7);
  EXPECT_EQ(disk_.write_file(path_, bytes), sha256(bytes));
  EXPECT_EQ(read_file(path_), bytes);
  EXPECT_EQ(sha256_of_file(path_), sha256(bytes));
  disk_.write_file(path_, "");
  EXPECT_EQ(read_file(path_), "");
  EXPECT_EQ(num_files(), 1u);
}

TEST_F(Disk, WritesInPieces) {
  const auto file = disk_.create(path_);
  file->write("first ");
  file->write("");
  file->write("second");
  EXPECT_FALSE(fs::exists(path_));
  EXPECT_EQ(file->commit(), sha256("first second"));
  EXPECT_EQ(read_file(path_), "first second");
  EXPECT_THROW(file->write("late"), InternalError);
  EXPECT_THROW(file->commit(), InternalError);
  EXPECT_EQ(num_files(), 1u);
}

TEST_F(Disk, DroppedWithoutCommitLeavesNothing) {
  { disk_.create(path_)->write("half"); }
  EXPECT_EQ(num_files(), 0u);
  disk_.write_file(path_, "old");
  { disk_.create(path_)->write("half"); }
  EXPECT_EQ(read_file(path_), "old");
  EXPECT_EQ(num_files(), 1u);
}

TEST_F(Disk, KilledWriterLeavesTheOldFile) {
  disk_.write_file(path_, "old");
  const pid_t child = fork();
  if (child == 0) {
    const auto file = disk_.create(path_);
    file->write(std::string(100'000, 'x'));
    raise(SIGKILL);
  }
  int status = 0;
  waitpid(child, &status, 0);
  ASSERT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(read_file(path_), "old");
  disk_.write_file(path_, "new");
  EXPECT_EQ(read_file(path_), "new");
  EXPECT_EQ(num_files(), 2u);
  remove_temporaries(disk_, folder_);
  EXPECT_EQ(num_files(), 1u);
}

TEST_F(Disk, OnlyTemporariesAreRemovedAsTemporaries) {
  const std::vector<std::string> kept{"a.tmp",    "a.1.tmp",   "a.1-.tmp",  "a.-1.tmp",
                                      ".1-1.tmp", "a.1-x.tmp", "a.1-1.tmpx"};
  for (const std::string& name : kept) std::ofstream(folder_ + "/" + name) << "mine";
  std::filesystem::create_directory(folder_ + "/a.1-2.tmp");
  std::filesystem::create_symlink(path_, folder_ + "/a.1-3.tmp");
  for (const char* name : {"a.1-1.tmp", "a.b-c.d.12345-99.tmp"}) std::ofstream(folder_ + "/" + name) << "left";
  remove_temporaries(disk_, folder_);
  EXPECT_EQ(num_files(), kept.size() + 2);
}

TEST_F(Disk, LeftoverOfThisProcessIdIsNotInTheWay) {
  std::ofstream(path_ + "." + std::to_string(getpid()) + "-0.tmp") << "left";
  disk_.write_file(path_, "new");
  EXPECT_EQ(read_file(path_), "new");
}

TEST_F(Disk, FullDiskIsAStorageErrorAndKeepsTheOldFile) {
  disk_.write_file(path_, "old");
  {
    const SmallDisk disk(10'000);
    try {
      disk_.write_file(path_, std::string(20'000, 'x'));
      ADD_FAILURE() << "no StorageError";
    } catch (const StorageError& error) {
      EXPECT_EQ(error.code(), ExitCode::storage);
      EXPECT_NE(std::string(error.what()).find(path_), std::string::npos);
      EXPECT_NE(std::string(error.what()).find("10000 bytes to go"), std::string::npos) << error.what();
    }
  }
  EXPECT_EQ(read_file(path_), "old");
  EXPECT_EQ(num_files(), 1u);
}

TEST_F(Disk, BytesThatChangeBeforeTheyReadBackAreNotPublished) {
  disk_.write_file(path_, "old");
  const auto file = disk_.create(path_);
  file->write("new");
  for (const auto& entry : fs::directory_iterator(folder_)) {
    if (entry.path().extension() == ".tmp") std::ofstream(entry.path()) << "nev";
  }
  EXPECT_THROW(file->commit(), StorageError);
  EXPECT_EQ(read_file(path_), "old");
}

TEST_F(Disk, TargetsThatCannotBeWritten) {
  EXPECT_THROW(disk_.write_file("/dev/full", "x"), StorageError);
  EXPECT_FALSE(fs::is_regular_file("/dev/full"));
  EXPECT_THROW(disk_.write_file(folder_, "x"), StorageError);
  EXPECT_THROW(disk_.write_file(folder_ + "/absent/x", "x"), StorageError);
}

TEST_F(Disk, Folders) {
  disk_.make_folders(folder_ + "/a/b/c");
  disk_.make_folders(folder_ + "/a/b/c");
  disk_.make_folders(folder_ + "/d/");
  EXPECT_TRUE(fs::is_directory(folder_ + "/a/b/c"));
  disk_.sync_folder(folder_ + "/a");
  disk_.write_file(path_, "x");
  EXPECT_THROW(disk_.make_folders(path_), StorageError);
  EXPECT_THROW(disk_.make_folders(path_ + "/below"), StorageError);
  EXPECT_THROW(disk_.sync_folder(folder_ + "/absent"), StorageError);
}

TEST_F(Disk, FoldersAppearCompleteOrNotAtAll) {
  const std::string place = folder_ + "/whole";
  {
    AtomicFolder folder(disk_, place + "/");
    disk_.write_file(folder.path() + "/a", "1");
    EXPECT_THROW((AtomicFolder{disk_, place}), ConfigError);  // one at a time
  }
  EXPECT_EQ(num_files(), 0u);
  disk_.make_folders(place + ".partial");
  disk_.write_file(place + ".partial/of a process that was killed", "x");
  {
    AtomicFolder folder(disk_, place);
    disk_.write_file(folder.path() + "/a", "1");
    EXPECT_FALSE(fs::exists(place));
    folder.commit();
  }
  EXPECT_EQ(num_files(), 1u);
  EXPECT_EQ(read_file(place + "/a"), "1");
  EXPECT_FALSE(fs::exists(place + "/of a process that was killed"));
  AtomicFolder again(disk_, place);
  EXPECT_THROW(again.commit(), StorageError);  // nothing is replaced
  disk_.make_folders(folder_ + "/other.partial/folder");
  EXPECT_THROW((AtomicFolder{disk_, folder_ + "/other"}), StorageError);
}

TEST_F(Disk, AppendsAllOrNothing) {
  disk_.append(path_, "one\n");
  disk_.append(path_, "two\n");
  EXPECT_EQ(read_file(path_), "one\ntwo\n");
  {
    const SmallDisk disk(10);
    EXPECT_THROW(disk_.append(path_, "more than there is room for\n"), StorageError);
  }
  EXPECT_EQ(read_file(path_), "one\ntwo\n");
  EXPECT_THROW(disk_.append(folder_ + "/absent/x", "x"), StorageError);
}

TEST_F(Disk, CopiesRenamesAndRemoves) {
  const std::string other = folder_ + "/other";
  disk_.write_file(path_, "x");
  EXPECT_EQ(disk_.copy_file(path_, other), sha256("x"));
  EXPECT_THROW(disk_.copy_file(folder_ + "/absent", other), MissingError);
  EXPECT_EQ(read_file(other), "x");
  disk_.rename(other, path_ + "2");
  EXPECT_THROW(disk_.rename(other, path_), StorageError);
  disk_.make_folders(folder_ + "/a/b");
  disk_.remove(folder_ + "/a");
  disk_.remove(folder_ + "/a");
  disk_.remove(path_);
  EXPECT_EQ(num_files(), 1u);
  EXPECT_EQ(read_file(path_ + "2"), "x");
  EXPECT_THROW(disk_.remove("/proc/self/status"), StorageError);
}

TEST_F(Disk, PermissionsFollowTheUmask) {
  const mode_t before = umask(027);
  disk_.write_file(path_, "x");
  umask(before);
  EXPECT_EQ(fs::status(path_).permissions(), fs::perms(0640));
}

}  // namespace
}  // namespace corank
