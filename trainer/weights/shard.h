#pragma once
#include <ATen/ATen.h>

#include <vector>

#include "comm/communicator.h"

namespace corank {

/// This rank's block of a tensor split over tensor-parallel ranks: indices [start, start + block) of `dim`; dim -1 =
/// whole. All ranks have equal blocks; the last may reach beyond the full tensor (padding, zeros).
struct Shard {
  int dim = -1;
  int64_t start = 0;
  int64_t block = 0;
  /// Not empty: `dim` holds several things one after another (q, k and v in one tensor, say), of these sizes. Each is
  /// split alike, so that a rank's block is its part of the first, then of the second, ... `start` is then the block's
  /// place in the order of ranks, not in the full tensor.
  std::vector<int64_t> sections = {};

  bool whole() const { return dim < 0; }
  /// Shape of the block of a tensor of shape `full`.
  std::vector<int64_t> local_shape(std::vector<int64_t> full) const;
  /// Where the block begins, per dimension. InternalError where sections leave no single beginning.
  std::vector<int64_t> offset(size_t dims) const;
  /// Equal parts of `full_size` along `dim` for `tp`, rounded up.
  static Shard of(int dim, int64_t full_size, const Communicator& tp);
  /// The same of sections, each of which must divide.
  static Shard of(int dim, const std::vector<int64_t>& sections, const Communicator& tp);
};

/// The block of `full` that `shard` describes, padded with zeros where it reaches beyond; a new tensor or a view.
at::Tensor take_shard(const at::Tensor& full, const Shard& shard);
/// Collective over tp (purpose checkpoint). The full tensor from every rank's block.
at::Tensor gather_shards(const at::Tensor& local, const Shard& shard, at::IntArrayRef full_shape, Communicator& tp);

}  // namespace corank
