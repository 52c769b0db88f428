#include "trainer/run/traffic.h"

#include <algorithm>
#include <numeric>
#include <set>

#include "trainer/layers/model.h"
#include "trainer/methods/start.h"
#include "trainer/methods/targets.h"
#include "trainer/run/base_walk.h"

namespace corank {
namespace {

/// Gradients of what no adapter sits on: all of it, or what stands in modules_to_save.
GradientSizes other_gradients(const TrafficShape& shape, bool full) {
  GradientSizes sizes;
  for (const auto& other : shape.others) {
    if (!full && !other.saved) continue;
    (other.scope == GradientScope::data ? sizes.data : sizes.everywhere) += other.elements;
  }
  return sizes;
}

bool embedding_trains(const TrafficShape& shape, bool full) {
  return full || std::any_of(shape.others.begin(), shape.others.end(), [](const TrafficShape::Other& other) {
           return other.role == WeightRole::embedding && other.saved;
         });
}

/// The linears that train, with their sizes.
std::vector<LinearSize> trained_linears(const TrafficShape& shape, const AdapterConfig& adapter, bool full) {
  if (full) return shape.linears;
  std::vector<std::string> names;
  for (const auto& linear : shape.linears) names.push_back(linear.name);
  const auto targets = select_targets(adapter, names);
  const std::set<std::string> chosen(targets.begin(), targets.end());
  std::vector<LinearSize> result;
  for (const auto& linear : shape.linears) {
    if (chosen.count(linear.name)) result.push_back(linear);
  }
  return result;
}

/// [N, D] sums that tensor-parallel ranks make for each token of a micro-batch: for the embedding, out of each
/// row-parallel linear, and in backward into the column-parallel ones.
int64_t sums_per_token(const std::vector<HalfLayer>& halves) {
  int64_t sums = 1;
  for (const HalfLayer& half : halves) sums += (half.again ? 2 : 1) + (half.in_gradient ? 1 : 0);
  return sums;
}

std::set<std::string> names_of(const std::vector<LinearSize>& linears) {
  std::set<std::string> names;
  for (const LinearSize& linear : linears) names.insert(linear.name);
  return names;
}

/// Bytes of weights that a method reads beside the passes of a step.
int64_t bytes_read_apart(const TrafficShape& shape, const std::set<std::string>& trained, int64_t reads) {
  int64_t bytes = 0;
  for (size_t i = 0; i < shape.linears.size(); ++i) {
    if (trained.count(shape.linears[i].name)) bytes += reads * shape.stored[i].gather_bytes;
  }
  return bytes;
}

}  // namespace

TrafficShape traffic_shape(Model& model, const AdapterConfig& adapter) {
  TrafficShape shape{model.hidden_size(), model.vocab_size(), model.num_layers(), {}, {}, {}};
  for (const AdaptedLinear* linear : model.linears()) {
    const LinearSite& site = linear->site();
    const bool bias = linear->num_base_parameters() > site.in * site.out;
    shape.linears.push_back({site.name, site.in, site.out, site.split == Split::row, bias, site.role});
    shape.stored.push_back({linear->weight().order(), linear->weight().gather_bytes()});
  }
  const auto saved = saved_modules(model, adapter);
  for (const NamedWeight& weight : model.other_weights()) {
    const bool is_saved =
        std::any_of(saved.begin(), saved.end(), [&](const NamedWeight& one) { return one.name == weight.name; });
    shape.others.push_back({weight.role, weight.weight->value.numel(), weight.scope, is_saved});
  }
  return shape;
}

std::map<Purpose, int64_t> predict_step_bytes(const TrafficShape& shape, const AdapterConfig& adapter, int tensor,
                                              int data, int activation_bytes, Checkpointing checkpointing,
                                              const std::vector<BatchSize>& micro_batches, int64_t step,
                                              const GradientSumEntry& sum) {
  const auto method = make_method(adapter);
  const bool full = method->trains_base();
  const auto trained = trained_linears(shape, adapter, full);
  GradientSizes sizes = other_gradients(shape, full);
  for (const LinearSize& linear : trained) {
    const GradientSizes one = method->gradient_sizes(linear, tensor);
    sizes.everywhere += one.everywhere;
    sizes.data += one.data;
  }
  std::map<Purpose, int64_t> bytes;
  const auto add = [&](Purpose purpose, int64_t count) {
    if (count > 0) bytes[purpose] += count;
  };
  const Purpose gradients = method->gradient_purpose();
  if (data * tensor > 1 && sizes.everywhere > 0) add(gradients, sum.payload_bytes(sizes.everywhere));
  if (data > 1 && sizes.data > 0) add(gradients, sum.payload_bytes(sizes.data));
  if (data * tensor > 1) add(Purpose::data_control, 16);  // loss, wish to stop
  add(Purpose::adapter_statistics, method->statistics_bytes(trained, tensor, data, step));
  const std::set<std::string> names = names_of(trained);
  const auto halves = half_layers(shape, names, embedding_trains(shape, full), checkpointing);
  const std::vector<int64_t> gathers = base_gathers(shape, halves, checkpointing);
  const int64_t in_passes = std::accumulate(gathers.begin(), gathers.end(), int64_t{0});
  add(Purpose::base_gathers,
      bytes_read_apart(shape, names, method->base_reads()) + static_cast<int64_t>(micro_batches.size()) * in_passes);
  if (tensor == 1) return bytes;
  add(Purpose::gradient_norm, 8);
  for (const BatchSize& batch : micro_batches) {
    const int64_t sums = sums_per_token(halves) * batch.tokens + batch.targets;
    add(Purpose::tensor_activations, sums * shape.hidden * activation_bytes);
    add(Purpose::vocabulary_loss, 3 * 4 * batch.targets);
  }
  return bytes;
}

}  // namespace corank
