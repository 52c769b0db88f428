#include "data/file.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "configs/error.h"

namespace corank {
namespace {

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

TEST(File, ReadRefusals) {
  const std::string folder = testing::TempDir() + "corank_file_" + std::to_string(getpid()), path = folder + "/file";
  std::filesystem::create_directories(folder);
  EXPECT_THROW(read_file(path), MissingError);
  EXPECT_THROW(read_file(folder), MissingError);
  EXPECT_THROW(sha256_of_file(path), MissingError);
  std::ofstream(path) << "12345";
  EXPECT_EQ(read_file(path, 5), "12345");
  EXPECT_THROW(read_file(path, 4), InputError);
  EXPECT_THROW(read_file("/dev/zero", 1000), InputError);
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace corank
