#pragma once
#include <ATen/ATen.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace corank {

/// One sample: token ids and which of them are targets.
struct Sample {
  at::Tensor tokens;     ///< int32 [T]
  at::Tensor loss_mask;  ///< uint8 [T]; 1 = to be predicted from the tokens before it; entry 0 never counts
  int64_t number = -1;   ///< in its file
};

/// What a token file says of the tokenizer that made it: "sha256:<hex>" each, empty where it says nothing.
struct TokenizerMark {
  std::string file;             ///< of tokenizer.json's bytes
  std::string content, loaded;  ///< tokenizer_fingerprint() of that file, and of what the program had loaded from it
};

/// Samples in one HDF5 file (README, "Token file"). Immutable; sample i is a pure function of the file. Opened by every
/// rank on its own. Tokens and mask are kept in memory if they take at most `memory_limit` bytes (HDF5 is slow at many
/// small reads); else the file stays open and is read sample by sample. Thread-safe for reads.
class TokenFile {
 public:
  /// MissingError; InputError for a wrong format, version, offsets that do not increase or do not end at N.
  explicit TokenFile(const std::string& path, int64_t memory_limit = int64_t{1} << 30);
  ~TokenFile();
  TokenFile(const TokenFile&) = delete;
  TokenFile& operator=(const TokenFile&) = delete;

  int64_t size() const { return static_cast<int64_t>(offsets_.size()) - 1; }
  int64_t length(int64_t sample) const { return offsets_[sample + 1] - offsets_[sample]; }
  int64_t num_tokens() const { return offsets_.back(); }
  int64_t vocab_size() const { return vocab_size_; }
  const std::string& path() const { return path_; }
  const TokenizerMark& tokenizer() const { return tokenizer_; }
  /// May share memory with the file's other samples: not to be written to.
  Sample read(int64_t sample) const;
  /// Targets of every sample among its first `seq_len` tokens. Reads all masks.
  std::vector<int64_t> num_targets(int64_t seq_len) const;
  /// SHA-256 of tokens, offsets and mask: the data's part of a run's identity. Reads everything.
  std::string fingerprint() const;
  /// Reads the whole file once: token ids in [0, vocab_size), mask 0 or 1, every sample with at least one target after
  /// its first token. InputError naming sample and value. `vocab_size` is the model's, and at least the file's.
  void validate(int64_t vocab_size) const;

 private:
  struct Impl;
  std::string path_;
  std::vector<int64_t> offsets_;
  int64_t vocab_size_ = 0;
  TokenizerMark tokenizer_;
  std::unique_ptr<Impl> impl_;
};

/// The image of a token file (tests); data/prepare writes the same from text.
std::string token_file_image(const std::vector<Sample>& samples, int64_t vocab_size, const std::string& source);

}  // namespace corank
