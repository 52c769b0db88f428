#include "data/loader.h"

#include <ATen/detail/CUDAHooksInterface.h>

#include <algorithm>
#include <future>
#include <string>
#include <utility>

#include "configs/error.h"

namespace corank {
namespace {

enum class Memory { ordinary, pinned };

/// True once something has been done on a GPU; asking does not wake one up.
bool cuda_is_up() {
  const auto& hooks = at::detail::getCUDAHooks();
  for (c10::DeviceIndex device = 0; device < hooks.deviceCount(); ++device) {
    if (hooks.hasPrimaryContext(device)) return true;
  }
  return false;
}

/// Batch with room for `num_tokens` tokens of `num_samples` samples.
struct BatchBuilder {
  BatchBuilder(int64_t num_tokens, int64_t num_targets, int64_t num_samples, Memory memory) {
    const auto make = [memory](int64_t size, at::ScalarType type) {
      return at::empty({size}, at::TensorOptions(type).pinned_memory(memory == Memory::pinned));
    };
    batch.tokens_N = make(num_tokens, at::kLong);
    batch.positions_N = make(num_tokens, at::kLong);
    batch.slots_N = make(num_tokens, at::kLong);
    batch.targets_M = make(num_targets, at::kLong);
    batch.target_rows_M = make(num_targets, at::kLong);
    batch.cu_seqlens = make(num_samples + 1, at::kInt);
    tokens = batch.tokens_N.mutable_data_ptr<int64_t>();
    positions = batch.positions_N.mutable_data_ptr<int64_t>();
    slots = batch.slots_N.mutable_data_ptr<int64_t>();
    targets = batch.targets_M.mutable_data_ptr<int64_t>();
    target_rows = batch.target_rows_M.mutable_data_ptr<int64_t>();
    cu_seqlens = batch.cu_seqlens.mutable_data_ptr<int32_t>();
    cu_seqlens[0] = 0;
  }

  /// Appends a sample whose first token has the name `slot`.
  void add(const Sample& sample, int64_t slot) {
    const int64_t length = sample.tokens.numel();
    const int32_t* ids = sample.tokens.const_data_ptr<int32_t>();
    const uint8_t* mask = sample.loss_mask.const_data_ptr<uint8_t>();
    for (int64_t i = 0; i < length; ++i) {
      tokens[row + i] = ids[i];
      positions[row + i] = i;
      slots[row + i] = slot + i;
      if (i > 0 && mask[i] != 0) {
        *targets++ = ids[i];
        *target_rows++ = row + i - 1;
      }
    }
    row += length;
    batch.lengths.push_back(length);
    batch.samples.push_back(sample.number);
    batch.max_length = std::max(batch.max_length, length);
    cu_seqlens[batch.lengths.size()] = static_cast<int32_t>(row);
  }

  Batch batch;
  int64_t row = 0;
  int64_t *tokens, *positions, *slots, *targets, *target_rows;
  int32_t* cu_seqlens;
};

int64_t count_targets(const Sample& sample) {
  const uint8_t* mask = sample.loss_mask.const_data_ptr<uint8_t>();
  const int64_t length = sample.loss_mask.numel();
  return length == 0 ? 0 : std::count_if(mask + 1, mask + length, [](uint8_t entry) { return entry != 0; });
}

Batch make_batch_in(Memory memory, const std::vector<std::vector<Sample>>& sequences, int64_t first_sequence,
                    int64_t seq_len) {
  int64_t num_tokens = 0, num_targets = 0, num_samples = 0;
  for (const std::vector<Sample>& sequence : sequences) {
    int64_t length = 0;
    for (const Sample& sample : sequence) {
      length += sample.tokens.numel();
      num_targets += count_targets(sample);
    }
    if (length > seq_len) {
      throw InternalError("a sequence of " + std::to_string(length) + " tokens exceeds seq_len " +
                          std::to_string(seq_len) + ".");
    }
    num_tokens += length;
    num_samples += static_cast<int64_t>(sequence.size());
  }
  if (num_tokens > INT32_MAX) {
    throw ConfigError("a micro-batch of " + std::to_string(num_tokens) +
                      " tokens exceeds 2^31 - 1; lower train.micro_batch_size.");
  }
  BatchBuilder builder(num_tokens, num_targets, num_samples, memory);
  for (size_t i = 0; i < sequences.size(); ++i) {
    int64_t slot = (first_sequence + static_cast<int64_t>(i)) * seq_len;
    for (const Sample& sample : sequences[i]) {
      builder.add(sample, slot);
      slot += sample.tokens.numel();
    }
  }
  return std::move(builder.batch);
}

/// One token without a target, so that a rank without samples can still make the calls of the others.
std::vector<std::vector<Sample>> padding() { return {{{at::zeros({1}, at::kInt), at::zeros({1}, at::kByte)}}}; }

using Sequences = std::vector<std::vector<int64_t>>;

/// The micro-batch of sequences [begin, end) of `sequences`, fewer where they end.
Batch read_batch(Memory memory, const TokenFile& file, const Sequences& sequences, int64_t begin, int64_t end,
                 int64_t first_sequence, int64_t seq_len) {
  std::vector<std::vector<Sample>> samples;
  for (int64_t i = begin; i < std::min(end, static_cast<int64_t>(sequences.size())); ++i) {
    std::vector<Sample>& sequence = samples.emplace_back();
    for (const int64_t number : sequences[i]) {
      const Sample whole = file.read(number);
      const int64_t length = std::min(whole.tokens.numel(), seq_len);
      sequence.push_back({whole.tokens.narrow(0, 0, length), whole.loss_mask.narrow(0, 0, length), number});
    }
  }
  return make_batch_in(memory, samples.empty() ? padding() : samples, first_sequence, seq_len);
}

int64_t divide_up(int64_t count, int64_t size) { return (count + size - 1) / size; }

void check_rank(const LoaderOptions& options) {
  if (options.dp_size < 1 || options.dp_rank < 0 || options.dp_rank >= options.dp_size) {
    throw InternalError("no data-parallel rank " + std::to_string(options.dp_rank) + " of " +
                        std::to_string(options.dp_size) + ".");
  }
}

void check_batch(const LoaderOptions& options) {
  const int64_t global = options.global_batch_size, micro = options.micro_batch_size;
  const int64_t at_once = options.uneven ? micro : micro * options.dp_size;
  if (global < 1 || micro < 1 || global % at_once != 0) {
    throw ConfigError("train.global_batch_size " + std::to_string(global) +
                      " must be a positive multiple of train.micro_batch_size " + std::to_string(micro) +
                      " times the data-parallel size " + std::to_string(options.dp_size) +
                      ". Change one of the three.");
  }
}

}  // namespace

Batch make_batch(const std::vector<std::vector<Sample>>& sequences, int64_t first_sequence, int64_t seq_len) {
  return make_batch_in(Memory::ordinary, sequences.empty() ? padding() : sequences, first_sequence, seq_len);
}

struct Loader::Impl {
  struct Prepared {
    StepBatches step;
    LoaderState after;
  };

  Impl(const TokenFile& tokens, const LoaderOptions& loader_options)
      : file(tokens), options(loader_options), sampler(tokens, loader_options.sampler) {}

  void start() {
    ahead = std::async(std::launch::async, [this, from = state] { return prepare(from); });
  }

  const Sequences& sequences_of(int64_t epoch) {
    if (cached_epoch != epoch) {
      cached = sampler.sequences(epoch);
      cached_epoch = epoch;
    }
    return cached;
  }

  Prepared prepare(const LoaderState& from) {
    const Sequences& sequences = sequences_of(from.epoch);
    const int64_t total = static_cast<int64_t>(sequences.size());
    if (from.sequence >= total) {
      throw InputError(file.path() + ": cannot go on at sequence " + std::to_string(from.sequence) + " of epoch " +
                       std::to_string(from.epoch) + ", which has " + std::to_string(total) +
                       ". The checkpoint belongs to other data or options.");
    }
    const int64_t end = std::min(from.sequence + options.global_batch_size, total);
    Prepared prepared;
    prepared.step = read_step(sequences, from.sequence);
    prepared.step.epoch = static_cast<double>(from.epoch) + static_cast<double>(end) / static_cast<double>(total);
    prepared.after = end == total ? LoaderState{from.epoch + 1, 0} : LoaderState{from.epoch, end};
    return prepared;
  }

  StepBatches read_step(const Sequences& sequences, int64_t first) const {
    const Memory memory = cuda_is_up() ? Memory::pinned : Memory::ordinary;
    const int64_t micro = options.micro_batch_size;
    StepBatches step;
    const int64_t left = std::min(options.global_batch_size, static_cast<int64_t>(sequences.size()) - first);
    const int64_t rounds = divide_up(divide_up(left, micro), options.dp_size);
    for (int64_t round = 0; round < rounds; ++round) {
      const int64_t k = round * options.dp_size + options.dp_rank, begin = first + k * micro;
      step.micro_batches.push_back(read_batch(memory, file, sequences, begin, std::min(begin + micro, first + left),
                                              k * micro, options.sampler.seq_len));
    }
    for (int64_t i = first; i < first + left; ++i) {
      for (const int64_t sample : sequences[i]) {
        step.num_targets += sampler.num_targets(sample);
        step.num_tokens += sampler.num_tokens(sample);
      }
    }
    return step;
  }

  const TokenFile& file;
  const LoaderOptions options;
  const Sampler sampler;
  LoaderState state;
  // Touched by the background task only.
  int64_t cached_epoch = -1;
  Sequences cached;
  // Last, so that its destructor waits for the task before anything above is gone.
  std::future<Prepared> ahead;
};

Loader::Loader(const TokenFile& file, LoaderOptions options) {
  check_rank(options);
  check_batch(options);
  impl_ = std::make_unique<Impl>(file, options);
  impl_->start();
}

Loader::~Loader() = default;

StepBatches Loader::next() {
  if (!impl_->ahead.valid()) impl_->start();
  Impl::Prepared prepared = impl_->ahead.get();
  impl_->state = prepared.after;
  impl_->start();
  return std::move(prepared.step);
}

LoaderState Loader::state() const { return impl_->state; }

void Loader::restore(const LoaderState& state) {
  if (state.epoch < 0 || state.sequence < 0) {
    throw InputError("a data position of epoch " + std::to_string(state.epoch) + ", sequence " +
                     std::to_string(state.sequence) + " cannot be; the checkpoint is damaged.");
  }
  if (impl_->ahead.valid()) impl_->ahead.wait();
  impl_->state = state;
  impl_->start();
}

int64_t Loader::steps_in_epoch(int64_t epoch) const {
  const int64_t total = static_cast<int64_t>(impl_->sampler.sequences(epoch).size());
  return divide_up(total, impl_->options.global_batch_size);
}

std::vector<Batch> evaluation_batches(const TokenFile& file, const LoaderOptions& options) {
  check_rank(options);
  SamplerOptions in_order = options.sampler;
  in_order.shuffle = false;
  const Sequences sequences = Sampler(file, in_order).sequences(0);
  const int64_t micro = options.micro_batch_size;
  const int64_t num_batches = divide_up(divide_up(static_cast<int64_t>(sequences.size()), micro), options.dp_size);
  std::vector<Batch> batches;
  for (int64_t i = 0; i < num_batches; ++i) {
    const int64_t begin = (i * options.dp_size + options.dp_rank) * micro;
    batches.push_back(read_batch(Memory::ordinary, file, sequences, begin, begin + micro, begin, in_order.seq_len));
  }
  return batches;
}

}  // namespace corank
