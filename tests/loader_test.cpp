#include "data/loader.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <optional>
#include <set>

#include "configs/error.h"
#include "data/storage.h"

namespace corank {
namespace {

at::Tensor ints(const std::vector<int64_t>& values, at::ScalarType type = at::kLong) {
  return at::tensor(values).to(type);
}

constexpr int64_t kStride = 1000;  // token p of sample i has the id i * kStride + p

std::vector<Sample> numbered_samples(int64_t count) {
  std::vector<Sample> samples;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = 2 + (i * 13) % 19;
    samples.push_back({at::arange(i * kStride, i * kStride + length, at::kInt),
                       at::arange(length, at::kLong).add(i).remainder(3).ne(0).to(at::kByte)});
    samples.back().loss_mask[1] = 1;  // each has a target
  }
  return samples;
}

void expect_equal(const Batch& a, const Batch& b) {
  EXPECT_TRUE(at::equal(a.tokens_N, b.tokens_N));
  EXPECT_TRUE(at::equal(a.positions_N, b.positions_N));
  EXPECT_TRUE(at::equal(a.targets_M, b.targets_M));
  EXPECT_TRUE(at::equal(a.target_rows_M, b.target_rows_M));
  EXPECT_TRUE(at::equal(a.slots_N, b.slots_N));
  EXPECT_TRUE(at::equal(a.cu_seqlens, b.cu_seqlens));
  EXPECT_EQ(a.lengths, b.lengths);
  EXPECT_EQ(a.max_length, b.max_length);
}

void expect_equal(const StepBatches& a, const StepBatches& b) {
  ASSERT_EQ(a.micro_batches.size(), b.micro_batches.size());
  for (size_t i = 0; i < a.micro_batches.size(); ++i) expect_equal(a.micro_batches[i], b.micro_batches[i]);
  EXPECT_EQ(a.num_targets, b.num_targets);
  EXPECT_EQ(a.num_tokens, b.num_tokens);
  EXPECT_EQ(a.epoch, b.epoch);
}

bool is_padding(const Batch& batch) {
  return batch.num_tokens() == 1 && batch.num_targets() == 0;  // no sample of these tests is one token
}

/// What holds for every batch.
void expect_sound(const Batch& batch) {
  ASSERT_EQ(batch.cu_seqlens.scalar_type(), at::kInt);
  for (const at::Tensor* tensor :
       {&batch.tokens_N, &batch.positions_N, &batch.slots_N, &batch.targets_M, &batch.target_rows_M}) {
    ASSERT_EQ(tensor->scalar_type(), at::kLong);
  }
  ASSERT_EQ(batch.cu_seqlens.numel(), static_cast<int64_t>(batch.lengths.size()) + 1);
  int64_t begin = 0;
  for (size_t s = 0; s < batch.lengths.size(); ++s) {
    const int64_t length = batch.lengths[s];
    ASSERT_EQ(batch.cu_seqlens[s].item<int64_t>(), begin);
    EXPECT_TRUE(at::equal(batch.positions_N.narrow(0, begin, length), at::arange(length)));
    begin += length;
  }
  EXPECT_EQ(batch.cu_seqlens[-1].item<int64_t>(), begin);
  EXPECT_EQ(batch.num_tokens(), begin);
  EXPECT_EQ(batch.max_length, *std::max_element(batch.lengths.begin(), batch.lengths.end()));
  if (batch.num_targets() == 0) return;
  // A target is the token after its row, and never the first of a sample.
  EXPECT_TRUE(at::equal(batch.tokens_N.index_select(0, batch.target_rows_M + 1), batch.targets_M));
  EXPECT_TRUE(batch.positions_N.index_select(0, batch.target_rows_M + 1).gt(0).all().item<bool>());
  EXPECT_TRUE(batch.target_rows_M.diff().gt(0).all().item<bool>());
}

class Loading : public testing::Test {
 protected:
  void SetUp() override {
    DiskStorage().write_file(path_, token_file_image(numbered_samples(53), 100 * kStride, "a test"));
    file_.emplace(path_);
  }
  void TearDown() override { std::filesystem::remove(path_); }
  static LoaderOptions options(int dp_rank = 0, int dp_size = 1) {
    return {.sampler = {.seq_len = 32, .seed = 5},
            .global_batch_size = 12,
            .micro_batch_size = 1,
            .dp_rank = dp_rank,
            .dp_size = dp_size};
  }
  const std::string path_ = testing::TempDir() + "corank_loader_" + std::to_string(getpid()) + ".h5";
  std::optional<TokenFile> file_;
};

TEST(MakeBatch, HandMadeExample) {
  const Sample first{ints({10, 11, 12, 13}, at::kInt), ints({1, 0, 1, 1}, at::kByte)};
  const Sample second{ints({20, 21}, at::kInt), ints({1, 1}, at::kByte)};
  const Sample third{ints({30, 31, 32}, at::kInt), ints({0, 1, 0}, at::kByte)};
  const Batch batch = make_batch({{first, second}, {third}}, 4, 8);
  EXPECT_TRUE(at::equal(batch.tokens_N, ints({10, 11, 12, 13, 20, 21, 30, 31, 32})));
  EXPECT_TRUE(at::equal(batch.positions_N, ints({0, 1, 2, 3, 0, 1, 0, 1, 2})));
  EXPECT_TRUE(at::equal(batch.targets_M, ints({12, 13, 21, 31})));
  EXPECT_TRUE(at::equal(batch.target_rows_M, ints({1, 2, 4, 6})));
  EXPECT_TRUE(at::equal(batch.slots_N, ints({32, 33, 34, 35, 36, 37, 40, 41, 42})));
  EXPECT_TRUE(at::equal(batch.cu_seqlens, ints({0, 4, 6, 9}, at::kInt)));
  EXPECT_EQ(batch.lengths, (std::vector<int64_t>{4, 2, 3}));
  EXPECT_EQ(batch.max_length, 4);
  EXPECT_EQ(batch.num_tokens(), 9);
  EXPECT_EQ(batch.num_targets(), 4);
  expect_sound(batch);
  expect_equal(batch.to(at::kCPU), batch);
  EXPECT_THROW(make_batch({{first, second}}, 0, 5), InternalError);
}

TEST(MakeBatch, PaddingHasOneTokenAndNoTarget) {
  const Batch batch = make_batch({}, 3, 8);
  EXPECT_TRUE(at::equal(batch.tokens_N, ints({0})));
  EXPECT_TRUE(at::equal(batch.slots_N, ints({24})));
  EXPECT_TRUE(at::equal(batch.cu_seqlens, ints({0, 1}, at::kInt)));
  EXPECT_EQ(batch.num_targets(), 0);
  expect_sound(batch);
}

TEST_F(Loading, EverySampleOnceAnEpochWhateverTheNumberOfRanks) {
  for (int dp_size = 1; dp_size <= 4; ++dp_size) {
    std::multiset<int64_t> first_tokens;
    std::map<int64_t, int64_t> num_targets, num_tokens;  // by step, over the ranks
    std::vector<StepBatches> told;
    for (int rank = 0; rank < dp_size; ++rank) {
      Loader loader(*file_, options(rank, dp_size));
      told.clear();
      while (loader.state().epoch == 0) {
        const StepBatches& step = told.emplace_back(loader.next());
        const auto number = static_cast<int64_t>(told.size()) - 1;
        EXPECT_LE(step.micro_batches.size(), 12u / dp_size);
        for (const Batch& batch : step.micro_batches) {
          expect_sound(batch);
          if (is_padding(batch)) continue;
          num_targets[number] += batch.num_targets();
          num_tokens[number] += batch.num_tokens();
          for (size_t s = 0; s < batch.lengths.size(); ++s) {
            const int64_t begin = batch.cu_seqlens[s].item<int64_t>();
            const int64_t token = batch.tokens_N[begin].item<int64_t>();
            const at::Tensor expected = at::arange(token, token + batch.lengths[s]);
            EXPECT_TRUE(at::equal(batch.tokens_N.narrow(0, begin, batch.lengths[s]), expected));
            EXPECT_EQ(batch.lengths[s], file_->length(token / kStride));
            first_tokens.insert(token);
          }
        }
      }
    }
    for (size_t i = 0; i < told.size(); ++i) {
      EXPECT_EQ(told[i].num_targets, num_targets[static_cast<int64_t>(i)]);
      EXPECT_EQ(told[i].num_tokens, num_tokens[static_cast<int64_t>(i)]);
    }
    ASSERT_EQ(first_tokens.size(), 53u);
    for (int64_t i = 0; i < 53; ++i) EXPECT_EQ(first_tokens.count(i * kStride), 1u);
  }
}

TEST_F(Loading, RanksTogetherHoldTheSameMicroBatchesInTheSameOrder) {
  Loader single(*file_, options());
  std::vector<StepBatches> expected;
  for (int step = 0; step < 9; ++step) expected.push_back(single.next());
  EXPECT_GE(single.state().epoch, 2);
  for (int dp_size = 2; dp_size <= 8; ++dp_size) {
    for (int rank = 0; rank < dp_size; ++rank) {
      LoaderOptions settings = options(rank, dp_size);
      settings.uneven = 12 % dp_size != 0;
      Loader loader(*file_, settings);
      for (const StepBatches& whole : expected) {
        const StepBatches step = loader.next();
        EXPECT_EQ(step.epoch, whole.epoch);
        EXPECT_EQ(step.num_targets, whole.num_targets);
        EXPECT_EQ(step.num_tokens, whole.num_tokens);
        EXPECT_LT((step.micro_batches.size() - 1) * dp_size, whole.micro_batches.size()) << "a round of padding alone";
        for (size_t i = 0; i < step.micro_batches.size(); ++i) {
          const size_t k = i * dp_size + rank;
          if (k < whole.micro_batches.size()) {
            expect_equal(step.micro_batches[i], whole.micro_batches[k]);
          } else {
            EXPECT_TRUE(is_padding(step.micro_batches[i]));
          }
        }
      }
      EXPECT_EQ(loader.state(), single.state());
    }
  }
}

TEST_F(Loading, SplitIntoMicroBatchesKeepsTheSequences) {
  LoaderOptions large = options();
  large.micro_batch_size = 4;
  Loader ones(*file_, options()), fours(*file_, large);
  for (int i = 0; i < 6; ++i) {
    const StepBatches small = ones.next(), big = fours.next();
    ASSERT_LE(big.micro_batches.size(), 3u);
    EXPECT_EQ(small.num_targets, big.num_targets);
    EXPECT_EQ(small.num_tokens, big.num_tokens);
    const auto real = [](const StepBatches& step, at::Tensor Batch::*member) {
      std::vector<at::Tensor> parts;
      for (const Batch& batch : step.micro_batches) {
        if (!is_padding(batch)) parts.push_back(batch.*member);
      }
      return at::cat(parts);
    };
    EXPECT_TRUE(at::equal(real(small, &Batch::tokens_N), real(big, &Batch::tokens_N)));
    EXPECT_TRUE(at::equal(real(small, &Batch::slots_N), real(big, &Batch::slots_N)));
    EXPECT_TRUE(at::equal(real(small, &Batch::targets_M), real(big, &Batch::targets_M)));
  }
}

TEST_F(Loading, SlotsNameEachTokenOfAGlobalBatchOnce) {
  for (const bool packing : {true, false}) {
    LoaderOptions settings = options();
    settings.sampler.packing = packing;
    Loader loader(*file_, settings);
    for (int i = 0; i < 12; ++i) {
      std::set<int64_t> slots;
      for (const Batch& batch : loader.next().micro_batches) {
        for (int64_t n = 0; n < batch.num_tokens(); ++n) {
          EXPECT_TRUE(slots.insert(batch.slots_N[n].item<int64_t>()).second);
        }
      }
      EXPECT_GE(*slots.begin(), 0);
      EXPECT_LT(*slots.rbegin(), 12 * 32);
    }
  }
}

TEST_F(Loading, ResumingAnywhereEqualsGoingThrough) {
  for (const int dp_size : {1, 2}) {
    Loader straight(*file_, options(dp_size - 1, dp_size));
    std::vector<LoaderState> states;
    std::vector<StepBatches> steps;
    for (int i = 0; i < 10; ++i) {
      states.push_back(straight.state());
      steps.push_back(straight.next());
    }
    for (size_t at = 0; at < states.size(); ++at) {
      Loader resumed(*file_, options(dp_size - 1, dp_size));
      if (at % 2) resumed.next();
      resumed.restore(states[at]);
      EXPECT_EQ(resumed.state(), states[at]);
      for (size_t i = at; i < steps.size(); ++i) expect_equal(resumed.next(), steps[i]);
    }
  }
}

TEST_F(Loading, StateIsThatOfTheBatchesHandedOut) {
  LoaderOptions settings = options();
  settings.sampler.packing = false;
  settings.global_batch_size = 25;
  Loader loader(*file_, settings);
  EXPECT_EQ(loader.state(), (LoaderState{0, 0}));
  EXPECT_EQ(loader.next().epoch, 25.0 / 53.0);
  EXPECT_EQ(loader.state(), (LoaderState{0, 25}));
  loader.next();
  const StepBatches last = loader.next();
  EXPECT_EQ(last.epoch, 1.0);
  EXPECT_EQ(loader.state(), (LoaderState{1, 0}));
  EXPECT_EQ(loader.next().epoch, 1.0 + 25.0 / 53.0);
  EXPECT_EQ(loader.steps_in_epoch(0), 3);
}

TEST_F(Loading, BatchFarLargerThanTheEpochHoldsTheEpoch) {
  LoaderOptions settings = options(1, 2);
  settings.sampler.packing = false;
  settings.micro_batch_size = 1;
  settings.global_batch_size = 1'000'000;
  Loader loader(*file_, settings);
  EXPECT_EQ(loader.next().micro_batches.size(), 27u);  // 53 over two ranks
  EXPECT_EQ(loader.state(), (LoaderState{1, 0}));
}

TEST_F(Loading, LastBatchOfAnEpochIsPadded) {
  for (int rank = 0; rank < 3; ++rank) {
    LoaderOptions settings = options(rank, 3);
    settings.sampler.packing = false;
    settings.micro_batch_size = 2;
    settings.global_batch_size = 18;  // 53 = 18 + 18 + 17: the very last micro-batch holds one sequence
    Loader loader(*file_, settings);
    loader.next();
    loader.next();
    const StepBatches last = loader.next();
    ASSERT_EQ(last.micro_batches.size(), 3u);
    EXPECT_EQ(last.micro_batches[2].lengths.size(), rank == 2 ? 1u : 2u);
  }
  for (int rank = 0; rank < 4; ++rank) {
    LoaderOptions settings = options(rank, 4);
    settings.sampler.packing = false;
    settings.micro_batch_size = 5;
    settings.global_batch_size = 20;  // the last batch holds 13 sequences: 5, 5, 3 and none
    Loader loader(*file_, settings);
    loader.next();
    loader.next();
    const StepBatches last = loader.next();
    ASSERT_EQ(last.micro_batches.size(), 1u);
    EXPECT_EQ(last.micro_batches[0].lengths.size(), std::vector<size_t>({5, 5, 3, 1})[rank]);
    EXPECT_EQ(is_padding(last.micro_batches[0]), rank == 3);
    if (rank == 3) {
      EXPECT_EQ(last.micro_batches[0].slots_N.item<int64_t>(), 15 * 32);
    }
  }
}

TEST_F(Loading, StepsInEpoch) {
  Loader loader(*file_, options());
  for (int64_t epoch = 0; epoch < 3; ++epoch) {
    int64_t steps = 0;
    for (; loader.state().epoch == epoch; ++steps) loader.next();
    EXPECT_EQ(loader.steps_in_epoch(epoch), steps);
  }
}

TEST_F(Loading, LongSamplesAreCutAtTheEnd) {
  LoaderOptions settings = options();
  settings.sampler = {.seq_len = 8, .packing = false, .shuffle = false};
  Loader loader(*file_, settings);
  const Batch batch = loader.next().micro_batches[1];  // sample 1 has 15 tokens
  ASSERT_EQ(file_->length(1), 15);
  EXPECT_TRUE(at::equal(batch.tokens_N, at::arange(kStride, kStride + 8)));
  EXPECT_TRUE(at::equal(batch.targets_M, ints({1001, 1003, 1004, 1006, 1007})));
  EXPECT_TRUE(at::equal(batch.slots_N, at::arange(8, 16)));
}

TEST_F(Loading, SameBatchesFromMemoryAndFromTheFile) {
  const TokenFile from_file(path_, 0);
  Loader a(*file_, options()), b(from_file, options());
  for (int i = 0; i < 5; ++i) expect_equal(a.next(), b.next());
}

TEST_F(Loading, WrongOptions) {
  const auto loader = [&](int64_t global, int64_t micro, int rank, int size, bool uneven = false) {
    Loader(*file_, {.sampler = {},
                    .global_batch_size = global,
                    .micro_batch_size = micro,
                    .dp_rank = rank,
                    .dp_size = size,
                    .uneven = uneven});
  };
  EXPECT_THROW(loader(8, 3, 0, 1), ConfigError);
  EXPECT_THROW(loader(8, 2, 0, 3), ConfigError);
  EXPECT_NO_THROW(loader(8, 2, 0, 3, true));
  EXPECT_THROW(loader(8, 3, 0, 1, true), ConfigError);
  EXPECT_THROW(loader(0, 1, 0, 1), ConfigError);
  EXPECT_THROW(loader(8, 0, 0, 1), ConfigError);
  EXPECT_THROW(loader(8, 1, 2, 2), InternalError);
  EXPECT_THROW(loader(8, 1, -1, 2), InternalError);
  EXPECT_THROW(Loader(*file_, {.sampler = {.seq_len = 0}}), ConfigError);
}

TEST_F(Loading, ErrorsOfTheBackgroundReachTheCaller) {
  Loader loader(*file_, options());
  EXPECT_THROW(loader.restore({0, -1}), InputError);
  EXPECT_THROW(loader.restore({-1, 0}), InputError);
  loader.restore({0, 1'000'000});
  EXPECT_THROW(loader.next(), InputError);
  EXPECT_THROW(loader.next(), InputError);
  EXPECT_EQ(loader.state(), (LoaderState{0, 1'000'000}));
  loader.restore({0, 0});
  Loader fresh(*file_, options());
  expect_equal(loader.next(), fresh.next());
}

TEST_F(Loading, FileThatBreaksWhileItIsRead) {
  const TokenFile from_file(path_, 0);
  Loader loader(from_file, options());
  loader.next();
  std::filesystem::resize_file(path_, 600);
  EXPECT_THROW(
      {
        for (int i = 0; i < 5; ++i) loader.next();
      },
      InputError);
}

TEST_F(Loading, DestroyedWhileTheBackgroundWorks) {
  for (int i = 0; i < 50; ++i) EXPECT_NO_THROW(Loader(*file_, options()));
}

// Samples 0, 3, 6, ... have their only target beyond seq_len. A run over the file is one over the others.
TEST_F(Loading, SamplesWithoutATargetAreNotThere) {
  std::vector<Sample> samples = numbered_samples(53), others;
  for (int64_t i = 0; i < 53; ++i) {
    if (i % 3 != 0) {
      others.push_back(samples[i]);
    } else {
      samples[i].tokens = at::arange(i * kStride, i * kStride + 40, at::kInt);
      samples[i].loss_mask = at::zeros({40}, at::kByte);
      samples[i].loss_mask[35] = 1;
    }
  }
  const std::string other_path = path_ + ".others";
  DiskStorage().write_file(path_, token_file_image(samples, 100 * kStride, "a test"));
  DiskStorage().write_file(other_path, token_file_image(others, 100 * kStride, "a test"));
  const TokenFile file(path_), on_disk(path_, 0), other(other_path);
  for (const bool packing : {true, false}) {
    LoaderOptions settings = options(1, 2);
    settings.sampler.packing = packing;
    Loader expected(other, settings), loader(file, settings), disk_loader(on_disk, settings);
    EXPECT_EQ(loader.steps_in_epoch(0), expected.steps_in_epoch(0));
    for (int i = 0; i < 10; ++i) {
      const StepBatches step = expected.next();
      expect_equal(loader.next(), step);
      expect_equal(disk_loader.next(), step);
    }
    const auto evaluated = evaluation_batches(file, settings), wanted = evaluation_batches(other, settings);
    ASSERT_EQ(evaluated.size(), wanted.size());
    for (size_t i = 0; i < wanted.size(); ++i) expect_equal(evaluated[i], wanted[i]);
  }
  std::filesystem::remove(other_path);
}

TEST_F(Loading, EvaluationNeedsNoBatchThatDivides) {
  LoaderOptions settings = options(0, 2);
  settings.global_batch_size = 7;
  EXPECT_NO_THROW(evaluation_batches(*file_, settings));
  EXPECT_THROW(Loader(*file_, settings), ConfigError);
}

TEST_F(Loading, EvaluationHoldsEverySampleOnceOnEqualNumbersOfMicroBatches) {
  for (const bool packing : {true, false}) {
    for (int dp_size = 1; dp_size <= 4; ++dp_size) {
      std::vector<std::vector<Batch>> ranks;
      for (int rank = 0; rank < dp_size; ++rank) {
        LoaderOptions settings = options(rank, dp_size);
        settings.sampler.packing = packing;
        settings.micro_batch_size = 3;
        settings.global_batch_size = 12 * dp_size;
        ranks.push_back(evaluation_batches(*file_, settings));
        EXPECT_EQ(ranks[rank].size(), ranks[0].size());
      }
      LoaderOptions in_order = options();
      in_order.sampler.packing = packing;
      in_order.sampler.shuffle = false;
      const auto sequences = Sampler(*file_, in_order.sampler).sequences(0);
      std::vector<int64_t> expected, found;
      for (const auto& sequence : sequences) expected.insert(expected.end(), sequence.begin(), sequence.end());
      size_t num_padding = 0;
      for (size_t k = 0; k < ranks[0].size() * dp_size; ++k) {
        const Batch& batch = ranks[k % dp_size][k / dp_size];
        expect_sound(batch);
        if (is_padding(batch)) {
          ++num_padding;
          continue;
        }
        EXPECT_EQ(batch.slots_N[0].item<int64_t>(), static_cast<int64_t>(k) * 3 * 32);
        for (size_t s = 0; s < batch.lengths.size(); ++s) {
          found.push_back(batch.tokens_N[batch.cu_seqlens[s].item<int64_t>()].item<int64_t>() / kStride);
          EXPECT_EQ(batch.samples[s], found.back());
        }
      }
      EXPECT_EQ(found, expected);
      EXPECT_LT(num_padding, static_cast<size_t>(dp_size));
    }
  }
}

}  // namespace
}  // namespace corank
