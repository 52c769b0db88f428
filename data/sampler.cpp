#include "data/sampler.h"

#include <algorithm>
#include <string>
#include <utility>

#include "configs/error.h"

namespace corank {
namespace {

/// Sequences that packing keeps open: enough to fill gaps well, few enough to keep samples near their place.
constexpr size_t kOpenSequences = 64;

/// SplitMix64 (Steele, Lea, Flood 2014): element i of the stream is a fixed function of (key, i). Written out because
/// the standard library's shuffle and distributions differ between implementations.
class SplitMix64 {
 public:
  explicit SplitMix64(uint64_t key) : state_(key) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  /// Uniform in [0, bound): draws from the incomplete last interval are dropped.
  uint64_t below(uint64_t bound) {
    const uint64_t dropped = (0 - bound) % bound;
    uint64_t drawn = next();
    while (drawn < dropped) drawn = next();
    return drawn % bound;
  }

 private:
  uint64_t state_;
};

uint64_t epoch_key(int64_t seed, int64_t epoch) {
  return SplitMix64(SplitMix64(static_cast<uint64_t>(seed)).next() + static_cast<uint64_t>(epoch)).next();
}

}  // namespace

Sampler::Sampler(const TokenFile& file, SamplerOptions options) : file_(file), options_(options) {
  if (options_.seq_len < 2) {
    throw ConfigError("data.seq_len is " + std::to_string(options_.seq_len) + " and must be at least 2.");
  }
  num_targets_ = file_.num_targets(options_.seq_len);
  for (int64_t i = 0; i < file_.size(); ++i) {
    if (num_targets_[i] > 0) used_.push_back(i);
  }
}

int64_t Sampler::num_truncated() const {
  return std::count_if(used_.begin(), used_.end(), [&](int64_t i) { return file_.length(i) > options_.seq_len; });
}

std::vector<int64_t> Sampler::sample_order(int64_t epoch) const {
  std::vector<int64_t> order = used_;
  if (!options_.shuffle) return order;
  SplitMix64 random(epoch_key(options_.seed, epoch));
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
  return order;
}

std::vector<std::vector<int64_t>> Sampler::pack(const std::vector<int64_t>& order) const {
  struct Open {
    size_t sequence;
    int64_t room;
  };
  std::vector<std::vector<int64_t>> sequences;
  std::vector<Open> window;  // oldest first
  for (const int64_t sample : order) {
    const int64_t length = num_tokens(sample);
    auto place = std::find_if(window.begin(), window.end(), [&](const Open& open) { return open.room >= length; });
    if (place == window.end()) {
      if (window.size() == kOpenSequences) window.erase(window.begin());
      window.push_back({sequences.size(), options_.seq_len});
      sequences.emplace_back();
      place = window.end() - 1;
    }
    sequences[place->sequence].push_back(sample);
    place->room -= length;
    if (place->room == 0) window.erase(place);
  }
  return sequences;
}

std::vector<std::vector<int64_t>> Sampler::sequences(int64_t epoch) const {
  const std::vector<int64_t> order = sample_order(epoch);
  if (options_.packing) return pack(order);
  std::vector<std::vector<int64_t>> single;
  for (const int64_t sample : order) single.push_back({sample});
  return single;
}

}  // namespace corank
