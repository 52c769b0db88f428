#pragma once
#include "trainer/weights/frozen_weight.h"

/// The formats of the table in formats.cpp, one file each.
namespace corank {

std::unique_ptr<FrozenWeight> make_dense_weight(const FormatOptions& options, const StoredWeight& stored,
                                                const Shard& shard, const WeightPlace& place);
std::unique_ptr<FrozenWeight> make_int8_weight(const FormatOptions& options, const StoredWeight& stored,
                                               const Shard& shard, const WeightPlace& place);
std::unique_ptr<FrozenWeight> make_nf4_weight(const FormatOptions& options, const StoredWeight& stored,
                                              const Shard& shard, const WeightPlace& place);

/// A line of the table.
struct Format {
  const char* name;
  std::unique_ptr<FrozenWeight> (*make)(const FormatOptions&, const StoredWeight&, const Shard&, const WeightPlace&);
  bool shares_rooms = false;  ///< weights may be rows of one matrix
};

/// For tests: the table has `format` too, at its end, as long as this lives.
class ScopedFormat {
 public:
  explicit ScopedFormat(const Format& format);
  ~ScopedFormat();
  ScopedFormat(const ScopedFormat&) = delete;
  ScopedFormat& operator=(const ScopedFormat&) = delete;

 private:
  std::string name_;
};

/// stored.read(shard); InputError if it holds NaN or infinity, which no block of quantised weights can.
at::Tensor read_finite(const StoredWeight& stored, const Shard& shard);

}  // namespace corank
