#include "trainer/weights/shard.h"

#include <algorithm>
#include <numeric>

#include "configs/error.h"

namespace corank {
namespace {

at::Tensor take_sections(const at::Tensor& full, const Shard& shard) {
  const int64_t ranks = full.size(shard.dim) / shard.block, rank = shard.start / shard.block;
  std::vector<at::Tensor> parts;
  int64_t begin = 0;
  for (const int64_t size : shard.sections) {
    parts.push_back(full.narrow(shard.dim, begin + rank * size / ranks, size / ranks));
    begin += size;
  }
  return at::cat(parts, shard.dim);
}

/// The ranks' blocks one after another along dim 0 -> the sections one after another.
at::Tensor join_sections(const at::Tensor& blocks, const Shard& shard) {
  const int64_t ranks = blocks.size(0) / shard.block;
  const at::Tensor by_rank = blocks.unflatten(0, {ranks, shard.block});
  std::vector<at::Tensor> parts;
  int64_t begin = 0;
  for (const int64_t size : shard.sections) {
    parts.push_back(by_rank.narrow(1, begin, size / ranks).flatten(0, 1));
    begin += size / ranks;
  }
  return at::cat(parts, 0);
}

}  // namespace

std::vector<int64_t> Shard::local_shape(std::vector<int64_t> full) const {
  if (!whole()) full[dim] = block;
  return full;
}

std::vector<int64_t> Shard::offset(size_t dims) const {
  if (!sections.empty()) throw InternalError("Shard: a block of several sections has no offset");
  std::vector<int64_t> result(dims, 0);
  if (!whole()) result[dim] = start;
  return result;
}

Shard Shard::of(int dim, int64_t full_size, const Communicator& tp) {
  if (tp.size() == 1) return {};
  const int64_t block = (full_size + tp.size() - 1) / tp.size();
  return {dim, block * tp.rank(), block};
}

Shard Shard::of(int dim, const std::vector<int64_t>& sections, const Communicator& tp) {
  Shard shard = of(dim, std::accumulate(sections.begin(), sections.end(), int64_t{0}), tp);
  for (const int64_t size : sections) {
    if (size % tp.size() != 0) throw InternalError("Shard: a section does not divide by the ranks");
  }
  if (!shard.whole() && sections.size() > 1) shard.sections = sections;
  return shard;
}

at::Tensor take_shard(const at::Tensor& full, const Shard& shard) {
  if (shard.whole()) return full;
  if (!shard.sections.empty()) return take_sections(full, shard);
  const int64_t size = full.size(shard.dim);
  const int64_t start = std::min(shard.start, size), length = std::min(shard.block, size - start);
  const at::Tensor part = full.narrow(shard.dim, start, length);
  if (length == shard.block) return part;
  at::Tensor padded = at::zeros(shard.local_shape(full.sizes().vec()), full.options());
  padded.narrow(shard.dim, 0, length).copy_(part);
  return padded;
}

at::Tensor gather_shards(const at::Tensor& local, const Shard& shard, at::IntArrayRef full_shape, Communicator& tp) {
  if (shard.whole()) return local;
  at::Tensor blocks = tp.all_gather(local.transpose(0, shard.dim).contiguous(), Purpose::checkpoint);
  if (!shard.sections.empty()) blocks = join_sections(blocks, shard);
  return blocks.transpose(0, shard.dim).narrow(shard.dim, 0, full_shape[shard.dim]);
}

}  // namespace corank
