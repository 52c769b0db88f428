#pragma once
#include "trainer/weights/frozen_weight.h"

/// The formats of the table in formats.cpp, one file each.
namespace corank {

std::unique_ptr<FrozenWeight> make_dense_weight(const FormatOptions& options, const StoredWeight& stored,
                                                const Shard& shard);
std::unique_ptr<FrozenWeight> make_int8_weight(const FormatOptions& options, const StoredWeight& stored,
                                               const Shard& shard);
std::unique_ptr<FrozenWeight> make_nf4_weight(const FormatOptions& options, const StoredWeight& stored,
                                              const Shard& shard);

/// stored.read(shard); InputError if it holds NaN or infinity, which no block of quantised weights can.
at::Tensor read_finite(const StoredWeight& stored, const Shard& shard);

}  // namespace corank
