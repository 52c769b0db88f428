#include "data/file.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>

#include "configs/error.h"

namespace corank {
namespace {

namespace fs = std::filesystem;

class File : public testing::Test {
 protected:
  void SetUp() override { fs::create_directories(folder_); }
  void TearDown() override { fs::remove_all(folder_); }
  size_t num_files() const {
    return static_cast<size_t>(std::distance(fs::directory_iterator(folder_), fs::directory_iterator()));
  }
  const std::string folder_ = testing::TempDir() + "corank_file_" + std::to_string(getpid());
  const std::string path_ = folder_ + "/result.bin";
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

// FIPS 180-4 examples, and the empty message.
TEST(Sha256, Vectors) {
  EXPECT_EQ(sha256(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(sha256(std::string(1'000'000, 'a')), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  Sha256 pieces;
  pieces.update("ab");
  pieces.update("");
  pieces.update("c");
  EXPECT_EQ(pieces.hex(), sha256("abc"));
}

TEST_F(File, WritesAndReads) {
  std::string bytes;
  for (int i = 0; i < 3'000'000; ++i) bytes += static_cast<char>(i * 7);
  EXPECT_EQ(write_file_atomically(path_, bytes), sha256(bytes));
  EXPECT_EQ(read_file(path_), bytes);
  EXPECT_EQ(sha256_of_file(path_), sha256(bytes));
  write_file_atomically(path_, "");
  EXPECT_EQ(read_file(path_), "");
  EXPECT_EQ(num_files(), 1u);
}

TEST_F(File, WritesInPieces) {
  AtomicFile file(path_);
  file.write("first ");
  file.write("");
  file.write("second");
  EXPECT_FALSE(fs::exists(path_));
  EXPECT_EQ(file.commit(), sha256("first second"));
  EXPECT_EQ(read_file(path_), "first second");
  EXPECT_THROW(file.write("late"), InternalError);
  EXPECT_THROW(file.commit(), InternalError);
  EXPECT_EQ(num_files(), 1u);
}

TEST_F(File, DroppedWithoutCommitLeavesNothing) {
  { AtomicFile(path_).write("half"); }
  EXPECT_EQ(num_files(), 0u);
  write_file_atomically(path_, "old");
  { AtomicFile(path_).write("half"); }
  EXPECT_EQ(read_file(path_), "old");
  EXPECT_EQ(num_files(), 1u);
}

TEST_F(File, KilledWriterLeavesTheOldFile) {
  write_file_atomically(path_, "old");
  const pid_t child = fork();
  if (child == 0) {
    AtomicFile file(path_);
    file.write(std::string(100'000, 'x'));
    raise(SIGKILL);
  }
  int status = 0;
  waitpid(child, &status, 0);
  ASSERT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(read_file(path_), "old");
  write_file_atomically(path_, "new");
  EXPECT_EQ(read_file(path_), "new");
  EXPECT_EQ(num_files(), 2u);
  remove_temporaries(folder_);
  EXPECT_EQ(num_files(), 1u);
}

TEST_F(File, OnlyTemporariesAreRemovedAsTemporaries) {
  const std::vector<std::string> kept{"a.tmp",    "a.1.tmp",   "a.1-.tmp",  "a.-1.tmp",
                                      ".1-1.tmp", "a.1-x.tmp", "a.1-1.tmpx"};
  for (const std::string& name : kept) std::ofstream(folder_ + "/" + name) << "mine";
  std::filesystem::create_directory(folder_ + "/a.1-2.tmp");
  std::filesystem::create_symlink(path_, folder_ + "/a.1-3.tmp");
  for (const char* name : {"a.1-1.tmp", "a.b-c.d.12345-99.tmp"}) std::ofstream(folder_ + "/" + name) << "left";
  remove_temporaries(folder_);
  EXPECT_EQ(num_files(), kept.size() + 2);
}

TEST_F(File, LeftoverOfThisProcessIdIsNotInTheWay) {
  std::ofstream(path_ + "." + std::to_string(getpid()) + "-0.tmp") << "left";
  write_file_atomically(path_, "new");
  EXPECT_EQ(read_file(path_), "new");
}

TEST_F(File, FullDiskIsAStorageErrorAndKeepsTheOldFile) {
  write_file_atomically(path_, "old");
  {
    const SmallDisk disk(10'000);
    try {
      write_file_atomically(path_, std::string(20'000, 'x'));
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

TEST_F(File, BytesThatChangeBeforeTheyReadBackAreNotPublished) {
  write_file_atomically(path_, "old");
  AtomicFile file(path_);
  file.write("new");
  for (const auto& entry : fs::directory_iterator(folder_)) {
    if (entry.path().extension() == ".tmp") std::ofstream(entry.path()) << "nev";
  }
  EXPECT_THROW(file.commit(), StorageError);
  EXPECT_EQ(read_file(path_), "old");
}

TEST_F(File, TargetsThatCannotBeWritten) {
  EXPECT_THROW(write_file_atomically("/dev/full", "x"), StorageError);
  EXPECT_FALSE(fs::is_regular_file("/dev/full"));
  EXPECT_THROW(write_file_atomically(folder_, "x"), StorageError);
  EXPECT_THROW(write_file_atomically(folder_ + "/absent/x", "x"), StorageError);
}

TEST_F(File, ReadRefusals) {
  EXPECT_THROW(read_file(path_), MissingError);
  EXPECT_THROW(read_file(folder_), MissingError);
  EXPECT_THROW(sha256_of_file(path_), MissingError);
  write_file_atomically(path_, "12345");
  EXPECT_EQ(read_file(path_, 5), "12345");
  EXPECT_THROW(read_file(path_, 4), InputError);
  EXPECT_THROW(read_file("/dev/zero", 1000), InputError);
}

TEST_F(File, Folders) {
  make_folders(folder_ + "/a/b/c");
  make_folders(folder_ + "/a/b/c");
  make_folders(folder_ + "/d/");
  EXPECT_TRUE(fs::is_directory(folder_ + "/a/b/c"));
  sync_folder(folder_ + "/a");
  write_file_atomically(path_, "x");
  EXPECT_THROW(make_folders(path_), StorageError);
  EXPECT_THROW(make_folders(path_ + "/below"), StorageError);
  EXPECT_THROW(sync_folder(folder_ + "/absent"), StorageError);
}

TEST_F(File, FoldersAppearCompleteOrNotAtAll) {
  const std::string place = folder_ + "/whole";
  {
    AtomicFolder folder(place + "/");
    write_file_atomically(folder.path() + "/a", "1");
    EXPECT_THROW(AtomicFolder{place}, ConfigError);  // one at a time
  }
  EXPECT_EQ(num_files(), 0u);
  make_folders(place + ".partial");
  write_file_atomically(place + ".partial/of a process that was killed", "x");
  {
    AtomicFolder folder(place);
    write_file_atomically(folder.path() + "/a", "1");
    EXPECT_FALSE(fs::exists(place));
    folder.commit();
  }
  EXPECT_EQ(num_files(), 1u);
  EXPECT_EQ(read_file(place + "/a"), "1");
  EXPECT_FALSE(fs::exists(place + "/of a process that was killed"));
  AtomicFolder again(place);
  EXPECT_THROW(again.commit(), StorageError);  // nothing is replaced
  make_folders(folder_ + "/other.partial/folder");
  EXPECT_THROW(AtomicFolder{folder_ + "/other"}, StorageError);
}

TEST_F(File, PermissionsFollowTheUmask) {
  const mode_t before = umask(027);
  write_file_atomically(path_, "x");
  umask(before);
  EXPECT_EQ(fs::status(path_).permissions(), fs::perms(0640));
}

}  // namespace
}  // namespace corank
