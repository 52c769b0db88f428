#include "trainer/layers/model.h"

namespace corank {

void train_weight(const NamedWeight& named, const std::string& name, ParameterStore& store) {
  ParameterSpec spec;
  spec.name = name;
  spec.shape = named.shape;
  spec.shard = named.shard;
  spec.decays = named.decays;
  spec.scope = named.scope;
  spec.initialise = [old = named.weight->value](const at::Tensor& local) { local.copy_(old); };
  spec.bind = [weight = named.weight](const ops::Weight& w) { *weight = w; };
  store.add(std::move(spec));
}

std::vector<std::string> linear_names(Model& model) {
  std::vector<std::string> names;
  for (const AdaptedLinear* linear : model.linears()) names.push_back(linear->name());
  return names;
}

ModuleNames module_names(Model& model) { return {linear_names(model), model.other_modules()}; }

std::set<std::string> transposed_weights(Model& model) {
  std::set<std::string> names;
  for (const AdaptedLinear* linear : model.linears()) {
    if (linear->site().fan_in_fan_out) names.insert(linear->name() + ".weight");
  }
  return names;
}

int64_t num_base_parameters(Model& model) {
  int64_t total = 0;
  for (const AdaptedLinear* linear : model.linears()) total += linear->num_base_parameters();
  for (const NamedWeight& weight : model.other_weights()) {
    int64_t count = 1;
    for (int64_t size : weight.shape) count *= size;
    total += count;
  }
  return total;
}

int64_t base_bytes(Model& model) {
  int64_t total = 0;
  for (const AdaptedLinear* linear : model.linears()) total += linear->weight().bytes();
  for (const NamedWeight& weight : model.other_weights()) total += static_cast<int64_t>(weight.weight->value.nbytes());
  return total;
}

SegmentAttention::SegmentAttention(const Batch& batch) : segments_{batch.cu_seqlens, batch.lengths, batch.max_length} {}

at::Tensor SegmentAttention::attend(int64_t, const at::Tensor& q_NHd, const at::Tensor& k_NKd, const at::Tensor& v_NKd,
                                    const ops::AttentionRule& rule) {
  return ops::attention(q_NHd, k_NKd, v_NKd, segments_, rule);
}

}  // namespace corank
