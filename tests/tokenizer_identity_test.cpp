#include "data/tokenizer_identity.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "configs/error.h"
#include "data/file.h"
#include "data/h5.h"
#include "data/storage.h"
#include "data/token_file.h"

namespace corank {
namespace {

constexpr const char* kBpe =
    R"({"model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2},"merges":["a b"]},"added_tokens":[{"id":3,"content":"<s>"}]})";
constexpr const char* kBpeHash = "sha256:91ad71f3c2edf682b0f21074fb05a057b39276fc72b77c111f505749a7fae0f7";

std::string fingerprint(const std::string& text) { return tokenizer_fingerprint(text, "tokenizer.json"); }

// Both values are Python's, of the definition written down once more with hashlib.
TEST(TokenizerFingerprint, OfKnownTokenizers) {
  EXPECT_EQ(fingerprint(kBpe), kBpeHash);
  EXPECT_EQ(fingerprint("{\"model\":{\"type\":\"Unigram\",\"vocab\":[[\"a\",-1.5],[\"\\u2581b\",0.0]]},"
                        "\"added_tokens\":[{\"id\":0,\"content\":\"a\"},{\"id\":7,\"content\":\"<s>\"}]}"),
            "sha256:0d4ac38b3d72d705a79c9093ae8fc0604fd8a404eaa3cdead9baf38c0add69d4");
}

TEST(TokenizerFingerprint, OfTheSameTokenizerHoweverItIsWritten) {
  for (const char* text :
       {R"({"added_tokens": [{"content": "<s>", "id": 3, "special": true}, {"id": 0, "content": "a"}],
            "model": {"merges": [["a", "b"]], "vocab": {"ab": 2, "a": 0, "b": 1}, "dropout": null}})",
        R"({"model":{"vocab":{"a":0,"b":1,"ab":2,"<s>":3},"merges":["a b"]},"added_tokens":null})"}) {
    EXPECT_EQ(fingerprint(text), kBpeHash) << text;
  }
}

TEST(TokenizerFingerprint, OfAnotherTokenizerDiffers) {
  for (const char* text :
       {R"({"model":{"vocab":{"a":1,"b":0,"ab":2},"merges":["a b"]},"added_tokens":[{"id":3,"content":"<s>"}]})",
        R"({"model":{"vocab":{"a":0,"b":1,"ab":2},"merges":[]},"added_tokens":[{"id":3,"content":"<s>"}]})",
        R"({"model":{"vocab":{"a":0,"b":1,"ab":2},"merges":["a b"]},"added_tokens":[{"id":3,"content":"<t>"}]})",
        R"({"model":{"vocab":{"a":0,"b":1,"ab":2},"merges":["a b"]}})"}) {
    EXPECT_NE(fingerprint(text), kBpeHash) << text;
  }
}

TEST(TokenizerFingerprint, WhatIsNoTokenizerIsRefused) {
  for (const char* text : {"",
                           "[]",
                           "{}",
                           R"({"model":null})",
                           R"({"model":[]})",
                           R"({"model":{"vocab":null}})",
                           R"({"model":{"vocab":{"a":"0"}}})",
                           R"({"model":{"vocab":{"a":1.5}}})",
                           R"({"model":{"vocab":{"a":18446744073709551615}}})",
                           R"({"model":{"vocab":[["a"]]}})",
                           R"({"model":{"vocab":[[1,0.5]]}})",
                           R"({"model":{"vocab":[["a","b"]]}})",
                           R"({"model":{"vocab":{},"merges":{}}})",
                           R"({"model":{"vocab":{},"merges":["ab"]}})",
                           R"({"model":{"vocab":{},"merges":[["a"]]}})",
                           R"({"model":{"vocab":{},"merges":[1]}})",
                           R"({"model":{"vocab":{}},"added_tokens":{}})",
                           R"({"model":{"vocab":{}},"added_tokens":[1]})",
                           R"({"model":{"vocab":{}},"added_tokens":[{"id":-1.5,"content":"a"}]})",
                           R"({"model":{"vocab":{}},"added_tokens":[{"id":1,"content":null}]})"}) {
    try {
      fingerprint(text);
      ADD_FAILURE() << "accepted: " << text;
    } catch (const InputError& error) {
      EXPECT_EQ(std::string(error.what()).rfind("tokenizer.json: ", 0), 0u) << error.what();
    }
  }
}

class SameTokenizer : public testing::Test {
 protected:
  void SetUp() override { std::filesystem::create_directories(folder_); }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  void write_tokens(const std::vector<std::pair<std::string, std::string>>& attributes) {
    h5::Writer writer;
    writer.write("tokens", at::ones({4}, at::kInt));
    writer.write("offsets", at::tensor({0, 4}, at::kLong));
    writer.write("loss_mask", at::ones({4}, at::kByte));
    writer.attribute("format", "corank-tokens");
    writer.attribute("version", int64_t{1});
    writer.attribute("vocab_size", int64_t{4});
    for (const auto& [name, value] : attributes) writer.attribute(name, value);
    DiskStorage().write_file(tokens_, writer.finish());
  }
  bool same() {
    try {
      require_same_tokenizer(TokenFile(tokens_), folder_, 8);
      return true;
    } catch (const InputError& error) {
      for (const std::string& part : {tokens_, folder_, std::string("vocabulary of 4"), std::string("has 8"),
                                      std::string("data/prepare --model")}) {
        EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
      }
      return false;
    }
  }
  const std::string folder_ = testing::TempDir() + "corank_tokenizer_" + std::to_string(getpid());
  const std::string tokens_ = folder_ + "/tokens.h5";
};

TEST_F(SameTokenizer, IsFoundByItsBytesOrItsFingerprints) {
  const std::string other = "sha256:" + sha256("other");
  write_tokens({{"tokenizer", other}});
  EXPECT_TRUE(same());  // the folder has none
  DiskStorage().write_file(folder_ + "/tokenizer.json", kBpe);
  EXPECT_FALSE(same());
  for (const auto& attributes : std::vector<std::vector<std::pair<std::string, std::string>>>{
           {},
           {{"tokenizer", "none"}},
           {{"tokenizer", "sha256:" + sha256(kBpe)}},
           {{"tokenizer", other}, {"tokenizer_content", kBpeHash}},
           {{"tokenizer", other}, {"tokenizer_content", other}, {"tokenizer_loaded", kBpeHash}}}) {
    write_tokens(attributes);
    EXPECT_TRUE(same());
  }
  for (const auto& attributes : std::vector<std::vector<std::pair<std::string, std::string>>>{
           {{"tokenizer", "another"}},
           {{"tokenizer", other}, {"tokenizer_content", "none"}},
           {{"tokenizer", other}, {"tokenizer_content", other}, {"tokenizer_loaded", other}}}) {
    write_tokens(attributes);
    EXPECT_FALSE(same());
  }
}

}  // namespace
}  // namespace corank
