#include "trainer/methods/lora_factors.h"

#include <cmath>

#include "trainer/ops/random.h"

namespace corank {
namespace {

using Fill = std::function<void(const ParameterSpec&, const at::Tensor&)>;

/// A block of several sections is no range of indices: taken from the whole.
void fill_block(const ParameterSpec& spec, const Fill& fill, const at::Tensor& local) {
  if (spec.shard.sections.empty()) return fill(spec, local);
  ParameterSpec whole = spec;
  whole.shard = {};
  const at::Tensor full = at::empty(spec.shape, local.options());
  fill(whole, full);
  local.copy_(take_shard(full, spec.shard));
}

ParameterSpec factor(std::string name, std::vector<int64_t> shape, Shard shard, int dim, GradientScope scope,
                     const Fill& fill) {
  ParameterSpec spec;
  spec.name = std::move(name);
  spec.shape = std::move(shape);
  spec.shard = shard;
  if (!shard.whole()) spec.shard.dim = dim;
  spec.scope = scope;
  if (fill) spec.initialise = [spec, fill](const at::Tensor& local) { fill_block(spec, fill, local); };
  return spec;
}

}  // namespace

void LoraFactors::add_to(ParameterStore& store, const LinearSite& site, const Options& options) {
  scale_ = options.scale;
  constexpr auto partial = GradientScope::everywhere, exact = GradientScope::data;
  ParameterSpec a = factor(peft_name(site.name, options.a_suffix), {options.rank, site.in}, site.in_shard, 1,
                           site.row() ? exact : partial, options.fill_a);
  ParameterSpec b = factor(peft_name(site.name, options.b_suffix), {site.out, options.rank}, site.out_shard, 0,
                           site.row() ? partial : exact, options.fill_b);
  a.bind = [this](const ops::Weight& w) { a_RI_ = w; };
  b.bind = [this](const ops::Weight& w) { b_OR_ = w; };
  store.add(std::move(a));
  store.add(std::move(b));
}

LoraFactors::Options lora_options(const AdapterConfig& config, const LinearSite& site, uint64_t seed) {
  LoraFactors::Options options;
  options.rank = config.rank_of(site.name);
  options.scale = config.scaling_of(site.name);
  const double bound = 1 / std::sqrt(static_cast<double>(site.in)), std = 1 / static_cast<double>(options.rank);
  const bool gaussian = config.init_lora_weights == "gaussian";
  options.fill_a = [=](const ParameterSpec& spec, const at::Tensor& local) {
    const uint64_t key = ops::key_of(seed, "init", spec.name);
    if (gaussian) {
      ops::fill_normal(local, key, 0, std, spec.shape, spec.shard.offset(2));
    } else {
      ops::fill_uniform(local, key, -bound, bound, spec.shape, spec.shard.offset(2));
    }
  };
  return options;
}

}  // namespace corank
