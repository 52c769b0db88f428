#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "data/token_file.h"

namespace corank {

struct SamplerOptions {
  int64_t seq_len = 1024;  ///< longest sequence in tokens; longer samples are cut at the end
  bool packing = true;     ///< several samples a sequence, as many as fit; else one
  bool shuffle = true;     ///< else file order
  int64_t seed = 42;
};

/// The sequences of one epoch: which samples stand in each. A pure function of (file, options, epoch), never of ranks,
/// platform or library version. Packing fills sequences in sample order (first fit over a small window of open ones).
/// Every sample that has a target once it is cut appears exactly once an epoch; the others are left out. Borrows the
/// file.
class Sampler {
 public:
  /// ConfigError if seq_len is below 2: a target needs a token before it.
  Sampler(const TokenFile& file, SamplerOptions options);

  /// Sequences of `epoch` (from 0): each a list of sample numbers.
  std::vector<std::vector<int64_t>> sequences(int64_t epoch) const;
  /// Samples that appear.
  int64_t num_used() const { return static_cast<int64_t>(used_.size()); }
  /// Tokens and targets of a sample once it is cut.
  int64_t num_tokens(int64_t sample) const { return std::min(file_.length(sample), options_.seq_len); }
  int64_t num_targets(int64_t sample) const { return num_targets_[sample]; }
  /// Those of them that are longer than seq_len, whose ends are never seen.
  int64_t num_truncated() const;
  const SamplerOptions& options() const { return options_; }

 private:
  std::vector<int64_t> sample_order(int64_t epoch) const;
  std::vector<std::vector<int64_t>> pack(const std::vector<int64_t>& order) const;
  const TokenFile& file_;
  SamplerOptions options_;
  std::vector<int64_t> num_targets_;  ///< by sample
  std::vector<int64_t> used_;         ///< in file order
};

}  // namespace corank
