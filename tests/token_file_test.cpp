#include "data/token_file.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <functional>
#include <thread>

#include "configs/error.h"
#include "data/h5.h"
#include "data/storage.h"

namespace corank {
namespace {

at::Tensor token_ints(const std::vector<int64_t>& values, at::ScalarType type) { return at::tensor(values).to(type); }

/// The parts of a file, to be spoiled one at a time.
struct Parts {
  at::Tensor tokens = token_ints({5, 6, 7, 8, 9, 1, 2}, at::kInt);
  at::Tensor offsets = token_ints({0, 3, 5, 7}, at::kLong);
  at::Tensor mask = token_ints({0, 1, 1, 0, 1, 1, 1}, at::kByte);
  std::string format = "corank-tokens";
  int64_t version = 1;
  int64_t vocab_size = 10;
};

class Tokens : public testing::Test {
 protected:
  void TearDown() override { std::filesystem::remove(path_); }
  void write(const Parts& parts) {
    h5::Writer writer;
    writer.write("tokens", parts.tokens);
    writer.write("offsets", parts.offsets);
    writer.write("loss_mask", parts.mask);
    writer.attribute("format", parts.format);
    writer.attribute("version", parts.version);
    writer.attribute("vocab_size", parts.vocab_size);
    DiskStorage().write_file(path_, writer.finish());
  }
  void expect_refused(const std::string& part, const std::function<void(Parts&)>& spoil) {
    Parts parts;
    spoil(parts);
    write(parts);
    for (const int64_t memory_limit : {int64_t{0}, int64_t{1} << 30}) {
      try {
        TokenFile(path_, memory_limit).validate(10);
        ADD_FAILURE() << "accepted, expected: " << part;
      } catch (const InputError& error) {
        EXPECT_EQ(std::string(error.what()).rfind(path_, 0), 0u) << error.what();
        EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
      }
    }
  }
  const std::string path_ = testing::TempDir() + "corank_tokens_" + std::to_string(getpid()) + ".h5";
};

TEST_F(Tokens, ReadsFromMemoryAndFromTheFile) {
  write(Parts());
  for (const int64_t memory_limit : {int64_t{0}, int64_t{7 * 5 - 1}, int64_t{7 * 5}, int64_t{1} << 30}) {
    const TokenFile file(path_, memory_limit);
    EXPECT_EQ(file.size(), 3);
    EXPECT_EQ(file.num_tokens(), 7);
    EXPECT_EQ(file.vocab_size(), 10);
    EXPECT_EQ(file.path(), path_);
    EXPECT_EQ(file.length(0), 3);
    EXPECT_EQ(file.length(2), 2);
    EXPECT_TRUE(at::equal(file.read(1).tokens, token_ints({8, 9}, at::kInt)));
    EXPECT_TRUE(at::equal(file.read(1).loss_mask, token_ints({0, 1}, at::kByte)));
    EXPECT_TRUE(at::equal(file.read(0).tokens, token_ints({5, 6, 7}, at::kInt)));
    EXPECT_THROW(file.read(3), InternalError);
    EXPECT_THROW(file.read(-1), InternalError);
    file.validate(10);
    file.validate(12);
  }
}

TEST_F(Tokens, FingerprintIsOfTheDataAlone) {
  write(Parts());
  const std::string original = TokenFile(path_).fingerprint();
  EXPECT_EQ(original.size(), 64u);
  EXPECT_EQ(TokenFile(path_, 0).fingerprint(), original);
  const std::vector<std::function<void(Parts&)>> changes{
      [](Parts& p) { p.tokens[6] = 3; }, [](Parts& p) { p.mask[6] = 0; }, [](Parts& p) { p.offsets[1] = 2; }};
  for (const auto& change : changes) {
    Parts parts;
    change(parts);
    write(parts);
    EXPECT_NE(TokenFile(path_).fingerprint(), original);
  }
  Parts other_vocabulary;
  other_vocabulary.vocab_size = 11;
  write(other_vocabulary);
  EXPECT_EQ(TokenFile(path_).fingerprint(), original);
}

TEST_F(Tokens, WrittenFilesReadBack) {
  const std::vector<Sample> samples{{token_ints({1, 2, 3}, at::kInt), token_ints({0, 0, 1}, at::kByte)},
                                    {token_ints({4, 5}, at::kInt), token_ints({1, 1}, at::kByte)}};
  DiskStorage().write_file(path_, token_file_image(samples, 6, "a test"));
  const TokenFile file(path_);
  ASSERT_EQ(file.size(), 2);
  for (int64_t i = 0; i < 2; ++i) {
    EXPECT_TRUE(at::equal(file.read(i).tokens, samples[i].tokens));
    EXPECT_TRUE(at::equal(file.read(i).loss_mask, samples[i].loss_mask));
  }
  file.validate(6);
  const h5::Reader reader(path_);
  EXPECT_EQ(reader.attribute_string("source"), "a test");
  EXPECT_TRUE(reader.has_attribute("tokenizer"));
  EXPECT_EQ(reader.attribute_string("created").size(), 20u);
}

TEST_F(Tokens, WrongFiles) {
  EXPECT_THROW(TokenFile{path_}, MissingError);
  DiskStorage().write_file(path_, "no hdf5");
  EXPECT_THROW(TokenFile{path_}, InputError);
  expect_refused("attribute format", [](Parts& p) { p.format = "other"; });
  expect_refused("has version 2", [](Parts& p) { p.version = 2; });
  expect_refused("vocab_size 0", [](Parts& p) { p.vocab_size = 0; });
  expect_refused("/tokens must be a vector of Int", [](Parts& p) { p.tokens = p.tokens.to(at::kLong); });
  expect_refused("/tokens must be a vector of Int", [](Parts& p) { p.tokens = p.tokens.view({1, 7}); });
  expect_refused("/offsets must be a vector of Long", [](Parts& p) { p.offsets = p.offsets.to(at::kInt); });
  expect_refused("/loss_mask must be a vector of Byte", [](Parts& p) { p.mask = p.mask.to(at::kInt); });
  expect_refused("7 tokens and 6 mask entries", [](Parts& p) { p.mask = p.mask.narrow(0, 0, 6).contiguous(); });
  expect_refused("holds no sample", [](Parts& p) { p.offsets = token_ints({7}, at::kLong); });
  expect_refused("/offsets go from 1 to 7", [](Parts& p) { p.offsets[0] = 1; });
  expect_refused("/offsets go from 0 to 8", [](Parts& p) { p.offsets[3] = 8; });
  expect_refused("sample 1 goes from token 3 to 3", [](Parts& p) { p.offsets[2] = 3; });
  expect_refused("sample 1 goes from token 6 to 5", [](Parts& p) { p.offsets[1] = 6; });
}

TEST_F(Tokens, ValidateNamesSampleAndValue) {
  expect_refused("sample 1, token 1: id 10 is outside", [](Parts& p) { p.tokens[4] = 10; });
  expect_refused("sample 0, token 0: id -1 is outside", [](Parts& p) { p.tokens[0] = -1; });
  expect_refused("sample 2, token 1: loss_mask is 2", [](Parts& p) { p.mask[6] = 2; });
  expect_refused("sample 1 of 2 tokens has no target", [](Parts& p) { p.mask[4] = 0; });
  // A first token cannot be predicted from anything.
  expect_refused("sample 2 of 2 tokens has no target", [](Parts& p) { p.mask[6] = 0; });
  expect_refused("vocabulary of 11", [](Parts& p) { p.vocab_size = 11; });
}

TEST_F(Tokens, ManyThreadsRead) {
  write(Parts());
  for (const int64_t memory_limit : {int64_t{0}, int64_t{1} << 30}) {
    const TokenFile file(path_, memory_limit);
    std::vector<std::jthread> threads;
    for (int i = 0; i < 3; ++i) {
      threads.emplace_back([&] {
        for (int repeat = 0; repeat < 30; ++repeat) {
          EXPECT_TRUE(at::equal(file.read(1).tokens, token_ints({8, 9}, at::kInt)));
        }
      });
    }
  }
}

}  // namespace
}  // namespace corank
