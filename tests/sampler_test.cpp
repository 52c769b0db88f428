#include "data/sampler.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <numeric>

#include "configs/error.h"
#include "data/storage.h"

namespace corank {
namespace {

using Sequences = std::vector<std::vector<int64_t>>;

class Sampling : public testing::Test {
 protected:
  void TearDown() override { std::filesystem::remove(path_); }
  void write(const std::vector<int64_t>& lengths) {
    std::vector<Sample> samples;
    for (const int64_t length : lengths)
      samples.push_back({at::ones({length}, at::kInt), at::ones({length}, at::kByte)});
    DiskStorage().write_file(path_, token_file_image(samples, 10, "a test"));
  }
  const std::string path_ = testing::TempDir() + "corank_sampler_" + std::to_string(getpid()) + ".h5";
};

std::vector<int64_t> mixed_lengths() {
  std::vector<int64_t> lengths;
  for (int64_t i = 0; i < 500; ++i) lengths.push_back(2 + (i * i * 7 + i) % 90);
  return lengths;
}

std::vector<int64_t> flat(const Sequences& sequences) {
  std::vector<int64_t> all;
  for (const auto& sequence : sequences) all.insert(all.end(), sequence.begin(), sequence.end());
  return all;
}

std::vector<int64_t> counting(int64_t size) {
  std::vector<int64_t> order(static_cast<size_t>(size));
  std::iota(order.begin(), order.end(), 0);
  return order;
}

TEST_F(Sampling, EverySampleExactlyOnceAndNoSequenceTooLong) {
  write(mixed_lengths());
  const TokenFile file(path_);
  for (const bool packing : {true, false}) {
    for (const bool shuffle : {true, false}) {
      const Sampler sampler(file, {.seq_len = 64, .packing = packing, .shuffle = shuffle, .seed = 3});
      for (const int64_t epoch : {0, 1, 7}) {
        const Sequences sequences = sampler.sequences(epoch);
        std::vector<int64_t> all = flat(sequences);
        std::sort(all.begin(), all.end());
        EXPECT_EQ(all, counting(500));
        for (const auto& sequence : sequences) {
          ASSERT_FALSE(sequence.empty());
          int64_t room = 64;
          for (const int64_t sample : sequence) room -= std::min<int64_t>(64, file.length(sample));
          EXPECT_GE(room, 0);
          EXPECT_TRUE(packing || sequence.size() == 1);
        }
      }
    }
  }
}

TEST_F(Sampling, OrderDependsOnSeedAndEpochOnly) {
  write(mixed_lengths());
  const TokenFile file(path_), again(path_, 0);
  const auto order = [&](const TokenFile& tokens, int64_t seed, int64_t epoch) {
    return Sampler(tokens, {.seq_len = 64, .seed = seed}).sequences(epoch);
  };
  EXPECT_EQ(order(file, 1, 0), order(again, 1, 0));
  EXPECT_NE(order(file, 1, 0), order(file, 1, 1));
  EXPECT_NE(order(file, 1, 0), order(file, 2, 0));
  EXPECT_NE(order(file, 1, 1), order(file, 2, 0));  // seed and epoch are not merely added
  EXPECT_NE(order(file, -1, 0), order(file, 1, 0));
}

TEST_F(Sampling, FileOrderWithoutShuffle) {
  write(mixed_lengths());
  const TokenFile file(path_);
  const Sampler sampler(file, {.seq_len = 64, .packing = false, .shuffle = false});
  EXPECT_EQ(flat(sampler.sequences(0)), counting(500));
  EXPECT_EQ(sampler.sequences(0), sampler.sequences(5));
}

TEST_F(Sampling, FirstFit) {
  write({6, 5, 4, 5, 8, 2, 20});
  const TokenFile file(path_);
  const Sampler sampler(file, {.seq_len = 10, .packing = true, .shuffle = false});
  EXPECT_EQ(sampler.sequences(0), (Sequences{{0, 2}, {1, 3}, {4, 5}, {6}}));
  EXPECT_EQ(sampler.num_truncated(), 1);
}

TEST_F(Sampling, WindowOfOpenSequencesIsBounded) {
  std::vector<int64_t> lengths(65, 8);
  lengths.push_back(2);  // the first sequence has left the window, the second is the oldest in it
  write(lengths);
  const Sequences sequences = Sampler(TokenFile(path_), {.seq_len = 10, .shuffle = false}).sequences(0);
  ASSERT_EQ(sequences.size(), 65u);
  EXPECT_EQ(sequences[0], std::vector<int64_t>{0});
  EXPECT_EQ(sequences[1], (std::vector<int64_t>{1, 65}));
}

TEST_F(Sampling, PackingFillsWell) {
  write(mixed_lengths());
  const TokenFile file(path_);
  const Sequences sequences = Sampler(file, {.seq_len = 128}).sequences(0);
  const double filled = static_cast<double>(file.num_tokens()) / (128.0 * static_cast<double>(sequences.size()));
  EXPECT_GT(filled, 0.9);
}

// The order is part of a run's identity: a checkpoint continued on another machine or build must see the same one.
TEST_F(Sampling, OrderIsTheSameOnEveryPlatform) {
  write(std::vector<int64_t>(10, 4));
  const TokenFile file(path_);
  const Sampler sampler(file, {.seq_len = 4, .packing = false, .seed = 42});
  EXPECT_EQ(flat(sampler.sequences(0)), (std::vector<int64_t>{6, 1, 8, 5, 2, 7, 4, 3, 9, 0}));
  EXPECT_EQ(flat(sampler.sequences(1)), (std::vector<int64_t>{0, 4, 8, 3, 5, 9, 7, 2, 6, 1}));
}

TEST_F(Sampling, EveryPlaceIsEquallyLikely) {
  write(std::vector<int64_t>(4, 4));
  const TokenFile file(path_);
  const Sampler sampler(file, {.seq_len = 4, .packing = false});
  std::map<std::vector<int64_t>, int> counts;
  for (int64_t epoch = 0; epoch < 24'000; ++epoch) ++counts[flat(sampler.sequences(epoch))];
  EXPECT_EQ(counts.size(), 24u);
  double chi_squared = 0;
  for (const auto& [order, count] : counts) chi_squared += (count - 1000.0) * (count - 1000.0) / 1000.0;
  EXPECT_LT(chi_squared, 49.7);  // 23 degrees of freedom, p = 0.001
}

TEST_F(Sampling, LeavesOutWhatHasNoTargetWithinTheCut) {
  const auto sample = [](int64_t length, int64_t target) {
    Sample result{at::ones({length}, at::kInt), at::zeros({length}, at::kByte)};
    result.loss_mask[target] = 1;
    return result;
  };
  DiskStorage().write_file(
      path_, token_file_image({sample(4, 3), sample(9, 8), sample(5, 4), sample(9, 2), sample(1, 0), sample(6, 0)}, 10,
                              "a test"));
  for (const int64_t memory_limit : {int64_t{0}, int64_t{1} << 30}) {
    const TokenFile file(path_, memory_limit);
    const auto order = [&](const SamplerOptions& options) { return Sampler(file, options).sequences(0); };
    EXPECT_EQ(order({.seq_len = 4, .packing = false, .shuffle = false}), (Sequences{{0}, {3}}));
    EXPECT_EQ(order({.seq_len = 5, .packing = false, .shuffle = false}), (Sequences{{0}, {2}, {3}}));
    EXPECT_EQ(order({.seq_len = 9, .packing = true, .shuffle = false}), (Sequences{{0, 2}, {1}, {3}}));
    const Sampler sampler(file, {.seq_len = 4});
    EXPECT_EQ(sampler.num_used(), 2);
    EXPECT_EQ(sampler.num_truncated(), 1);
    EXPECT_EQ(flat(sampler.sequences(3)).size(), 2u);
  }
}

TEST_F(Sampling, TooShortSequences) {
  write({4});
  const TokenFile file(path_);
  EXPECT_THROW(Sampler(file, {.seq_len = 1}), ConfigError);
}

}  // namespace
}  // namespace corank
