#pragma once
#include "trainer/quant/frozen_weight.h"

/// The formats of the table in formats.cpp, one file each.
namespace corank {

std::unique_ptr<FrozenWeight> make_dense_weight(const FormatOptions& options, const ReadShard& read,
                                                const Shard& shard);

}  // namespace corank
