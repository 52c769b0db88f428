#include "trainer/parameters.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "configs/error.h"

namespace corank {
namespace {

int64_t product(at::IntArrayRef shape) {
  int64_t n = 1;
  for (int64_t size : shape) n *= size;
  return n;
}

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

void ParameterStore::add(ParameterSpec spec) {
  if (masters_.defined()) throw InternalError("ParameterStore: add() after allocate()");
  if (!index_.emplace(spec.name, parameters_.size()).second)
    throw InternalError("ParameterStore: two parameters named " + spec.name);
  Parameter parameter;
  parameter.spec = std::move(spec);
  parameters_.push_back(std::move(parameter));
}

void ParameterStore::scale_learning_rates(const std::function<double(const ParameterSpec&)>& scale) {
  for (Parameter& p : parameters_) p.spec.lr_scale *= scale(p.spec);
}

void ParameterStore::allocate(at::Device device, at::ScalarType master_dtype, at::ScalarType compute_dtype) {
  std::stable_partition(parameters_.begin(), parameters_.end(),
                        [](const Parameter& p) { return p.spec.scope == GradientScope::everywhere; });
  int64_t total = 0;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    Parameter& p = parameters_[i];
    index_[p.spec.name] = i;
    p.begin = total;
    total += product(p.spec.shard.local_shape(p.spec.shape));
    if (p.spec.scope == GradientScope::everywhere) num_everywhere_ = total;
  }
  const auto options = at::TensorOptions(device);
  masters_ = at::zeros({total}, options.dtype(master_dtype));
  gradients_ = at::zeros_like(masters_);
  compute_ = compute_dtype == master_dtype ? masters_ : at::zeros({total}, options.dtype(compute_dtype));

  for (Parameter& p : parameters_) {
    const auto shape = p.spec.shard.local_shape(p.spec.shape);
    const auto view = [&](const at::Tensor& flat) { return flat.narrow(0, p.begin, product(shape)).view(shape); };
    p.master = view(masters_);
    p.gradient = view(gradients_);
    p.weight.value = view(compute_);
    // Its own autograd identity on the same storage: the leaf must not be a view of a tensor that changes in place.
    p.weight.leaf = p.master.detach().requires_grad_();
    p.weight.leaf.mutable_grad() = p.gradient;
    if (p.spec.initialise) p.spec.initialise(p.master);
    p.spec.initialise = nullptr;  // frees what it held
  }
  refresh();
  for (Parameter& p : parameters_) {
    if (p.spec.bind) p.spec.bind(p.weight);
  }
}

const ParameterStore::Parameter& ParameterStore::at(const std::string& name) const {
  const auto found = index_.find(name);
  if (found == index_.end()) throw InternalError("ParameterStore: no parameter named " + name);
  return parameters_[found->second];
}

at::Tensor ParameterStore::gradients_of(GradientScope scope) const {
  return scope == GradientScope::everywhere ? gradients_.narrow(0, 0, num_everywhere_)
                                            : gradients_.narrow(0, num_everywhere_, num_local() - num_everywhere_);
}

int64_t ParameterStore::num_parameters() const {
  int64_t total = 0;
  for (const Parameter& p : parameters_) total += product(p.spec.shape);
  return total;
}

void ParameterStore::refresh() {
  if (!compute_.is_same(masters_)) compute_.copy_(masters_);
}

void require_shape(const ParameterSpec& spec, const at::Tensor& full) {
  if (full.sizes() == at::IntArrayRef(spec.shape)) return;
  throw InputError(
      fmt::format("tensor {}: the file has shape [{}], the run needs [{}]. Load it with the rank, targets "
                  "and base model it was trained with.",
                  spec.name, fmt::join(full.sizes(), ", "), fmt::join(spec.shape, ", ")));
}

void ParameterStore::load(const std::string& name, const at::Tensor& full) {
  const Parameter& p = at(name);
  require_shape(p.spec, full);
  p.master.copy_(take_shard(full, p.spec.shard));
}

std::vector<std::pair<std::string, at::Tensor>> ParameterStore::gather(const at::Tensor& flat, Communicator& tp) const {
  std::vector<std::pair<std::string, at::Tensor>> result;
  for (const Parameter& p : parameters_) {
    const at::Tensor local = flat.narrow(0, p.begin, p.master.numel()).view(p.master.sizes());
    const at::Tensor full = gather_shards(local, p.spec.shard, p.spec.shape, tp);
    result.emplace_back(p.spec.name, full.to(at::kCPU).contiguous().clone());
  }
  return result;
}

}  // namespace corank
