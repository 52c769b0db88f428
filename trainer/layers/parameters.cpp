#include "trainer/layers/parameters.h"

#include <fmt/format.h>

#include <algorithm>

#include "configs/error.h"

namespace corank {
namespace {

int64_t product(at::IntArrayRef shape) {
  int64_t n = 1;
  for (int64_t size : shape) n *= size;
  return n;
}

/// Of what this rank keeps.
std::vector<int64_t> kept_shape(const ParameterSpec& spec) {
  const std::vector<int64_t> block = spec.shard.local_shape(spec.shape);
  return spec.share ? std::vector<int64_t>{spec.share->part_elements(product(block))} : block;
}

void initialise(const ParameterSpec& spec, const at::Tensor& master) {
  if (!spec.initialise) return;
  if (!spec.share) return spec.initialise(master);
  const at::Tensor block = at::zeros(spec.shard.local_shape(spec.shape), master.options());
  spec.initialise(block);
  master.copy_(spec.share->part_of(block));
}

}  // namespace

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
  std::stable_sort(parameters_.begin(), parameters_.end(),
                   [](const Parameter& a, const Parameter& b) { return a.spec.scope < b.spec.scope; });
  int64_t total = 0;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    Parameter& p = parameters_[i];
    index_[p.spec.name] = i;
    p.begin = total;
    const int64_t count = product(kept_shape(p.spec));
    total += count;
    if (p.spec.scope == GradientScope::everywhere) num_everywhere_ += count;
    if (p.spec.scope == GradientScope::data) num_data_ += count;
  }
  const auto options = at::TensorOptions(device);
  masters_ = at::zeros({total}, options.dtype(master_dtype));
  gradients_ = at::zeros_like(masters_);
  compute_ = compute_dtype == master_dtype ? masters_ : at::zeros({total}, options.dtype(compute_dtype));

  for (Parameter& p : parameters_) {
    const auto shape = kept_shape(p.spec);
    const auto view = [&](const at::Tensor& flat) { return flat.narrow(0, p.begin, product(shape)).view(shape); };
    p.master = view(masters_);
    p.gradient = view(gradients_);
    p.weight.value = view(compute_);
    // Its own autograd identity on the same storage: the leaf must not be a view of a tensor that changes in place.
    p.weight.leaf = p.master.detach().requires_grad_();
    p.weight.leaf.mutable_grad() = p.gradient;
    initialise(p.spec, p.master);
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
  const int64_t before_summed = num_everywhere_ + num_data_;
  if (scope == GradientScope::everywhere) return gradients_.narrow(0, 0, num_everywhere_);
  if (scope == GradientScope::data) return gradients_.narrow(0, num_everywhere_, num_data_);
  return gradients_.narrow(0, before_summed, num_local() - before_summed);
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
  p.master.copy_(part_of(p, full));
}

at::Tensor ParameterStore::part_of(const Parameter& parameter, const at::Tensor& full) const {
  const ParameterSpec& spec = parameter.spec;
  require_shape(spec, full);
  const at::Tensor block = take_shard(full, spec.shard);
  return spec.share ? spec.share->part_of(block) : block;
}

std::vector<std::pair<std::string, at::Tensor>> ParameterStore::gather(const at::Tensor& flat, Communicator& tp) const {
  std::vector<std::pair<std::string, at::Tensor>> result;
  for (const Parameter& p : parameters_) {
    const at::Tensor kept = flat.narrow(0, p.begin, p.master.numel()).view(p.master.sizes());
    const at::Tensor block = p.spec.share ? p.spec.share->whole(kept, p.spec.shard.local_shape(p.spec.shape)) : kept;
    const at::Tensor full = gather_shards(block, p.spec.shard, p.spec.shape, tp);
    result.emplace_back(p.spec.name, full.to(at::kCPU).contiguous().clone());
  }
  return result;
}

}  // namespace corank
