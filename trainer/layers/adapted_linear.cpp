#include "trainer/layers/adapted_linear.h"

#include <fmt/format.h>

#include "configs/error.h"
#include "trainer/layers/regions.h"

namespace corank {

AdaptedLinear::AdaptedLinear(LinearSite site, BaseWeight base, at::Tensor bias_O, bool adds_bias)
    : site_(std::move(site)),
      base_(std::move(base)),
      weight_(make_frozen_weight(base_.format, base_.stored, base_.shard, base_.place)),
      adds_bias_(adds_bias) {
  bias_O_.value = std::move(bias_O);
}

void AdaptedLinear::require_full_base() const {
  if (!base_.stored.read_nf4()) return;
  throw ConfigError(
      fmt::format("{}: the model's files hold it in 4 bits, and this adapter starts from the full weight. Take the "
                  "model in 16 bits.",
                  name()));
}

at::Tensor AdaptedLinear::read_base() const {
  require_full_base();
  return base_.stored.read({}).to(base_.format.device, base_.format.dtype);
}

void AdaptedLinear::rebuild(const std::function<at::Tensor(const at::Tensor& full_OI)>& change) {
  StoredWeight stored = base_.stored;
  if (change) {
    stored.read = [&](const Shard& shard) {
      return take_shard(change(read_base().to(at::kFloat)).to(at::kCPU), shard);
    };
    stored.read_nf4 = [] { return std::nullopt; };
  }
  weight_ = make_frozen_weight(base_.format, stored, base_.shard, base_.place);
  is_merged_ = false;
  is_original_ = !change;
}

at::Tensor AdaptedLinear::gather_weight(Communicator& tp) const {
  return gather_shards(weight_->dense_OI(), base_.shard, {site_.out, site_.in}, tp);
}

void AdaptedLinear::merge(const at::Tensor& w_OI) {
  FormatOptions dense = base_.format;
  dense.name = "none";
  const StoredWeight merged{name(), [&](const Shard& shard) { return take_shard(w_OI, shard); }, {}};
  weight_ = make_frozen_weight(dense, merged, base_.shard, base_.place);
  is_merged_ = true;
  is_original_ = false;
}

at::Tensor AdaptedLinear::stored_form(const at::Tensor& full_OI) const {
  StoredWeight stored = base_.stored;
  stored.read = [cpu = full_OI.to(at::kCPU, at::kFloat)](const Shard& shard) { return take_shard(cpu, shard); };
  stored.read_nf4 = [] { return std::nullopt; };
  return make_frozen_weight(base_.format, stored, {})->dense_OI().to(full_OI.options().dtype(at::kFloat));
}

void AdaptedLinear::train_base(ParameterStore& store) {
  ParameterSpec weight;
  weight.name = site_.name + ".weight";
  weight.shape = {site_.out, site_.in};
  weight.shard = site_.split == Split::column ? site_.out_shard : site_.in_shard;
  if (!weight.shard.whole()) weight.shard.dim = site_.split == Split::column ? 0 : 1;
  weight.share = weight_share_ = base_.place.residency->trained_share(base_.format.dtype);
  if (weight.share) weight.scope = GradientScope::summed;
  weight.initialise = [this](const at::Tensor& local) { local.copy_(weight_->dense_OI()); };
  weight.bind = [this, shape = weight.shard.local_shape(weight.shape)](const ops::Weight& w) {
    base_.place.room_OI = at::Tensor();  // the trained tensor takes its place
    weight_ = make_trained_weight(w.value, shape, base_.place);
    weight_leaf_ = w.leaf;
  };
  store.add(std::move(weight));
  if (!bias_O_.defined()) return;
  // Row-parallel, one rank adds the bias and forms its whole gradient; the others' part of the sum is zero.
  const bool row = site_.split == Split::row;
  ParameterSpec bias;
  bias.name = site_.name + ".bias";
  bias.shape = {site_.out};
  bias.shard = row ? Shard{} : site_.out_shard;
  bias.scope = row ? GradientScope::everywhere : GradientScope::data;
  bias.decays = false;
  bias.initialise = [old = bias_O_.value](const at::Tensor& local) { local.copy_(old); };
  bias.bind = [this](const ops::Weight& w) { bias_O_ = w; };
  store.add(std::move(bias));
}

Projection AdaptedLinear::projection(const ForwardContext& context, const at::Tensor& rows_N) const {
  Projection p;
  p.matrix = weight_.get();
  p.matrix_leaf = weight_leaf_;
  p.matrix_share = weight_share_.get();
  if (bias_O_.defined() && adds_bias_) p.bias_O = bias_O_;
  if (!adapter_ || is_merged_) return p;
  ops::Dropout dropout;
  if (context.dropout && adapter_->dropout() > 0) {
    dropout = {adapter_->dropout(), context.dropout->key("dropout", site_.name),
               rows_N.defined() ? context.batch.slots_N.index_select(0, rows_N) : context.batch.slots_N,
               site_.row() ? site_.in_shard.start : 0};
  }
  p.update = adapter_->update(dropout);
  return p;
}

std::vector<at::Tensor> column_forward(const std::vector<const AdaptedLinear*>& linears, const at::Tensor& x_NI,
                                       const ForwardContext& context, const at::Tensor& rows_N) {
  std::vector<Projection> projections;
  for (const AdaptedLinear* linear : linears) projections.push_back(linear->projection(context, rows_N));
  return project(enter_tensor_region(x_NI, context.tp), std::move(projections));
}

at::Tensor row_forward(const AdaptedLinear& linear, const at::Tensor& x_NI, const ForwardContext& context,
                       const at::Tensor& rows_N) {
  return leave_tensor_region(project(x_NI, {linear.projection(context, rows_N)})[0], context.tp);
}

}  // namespace corank
