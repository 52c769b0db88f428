#include "trainer/run/traffic.h"

#include <algorithm>
#include <set>

#include "trainer/layers/model.h"
#include "trainer/methods/start.h"
#include "trainer/methods/targets.h"

namespace corank {
namespace {

constexpr int64_t kMasterBytes = 4;

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

bool is_feed_forward(const LinearSize& linear) {
  return linear.role == LinearRole::feed_forward_in || linear.role == LinearRole::feed_forward_out;
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

/// [N, D] sums that tensor-parallel ranks make for each token of a micro-batch.
int64_t sums_per_token(const TrafficShape& shape, const std::vector<LinearSize>& trained_linears, bool full,
                       Checkpointing checkpointing) {
  std::set<std::string> trained;
  for (const LinearSize& linear : trained_linears) trained.insert(linear.name);
  int64_t sums = 1;                                 // the embedding
  bool needs_grad = embedding_trains(shape, full);  // of the block's input: something below it trains, or is run again
  bool half_begins = true, half_trains = false;     // attention or feed-forward, each from one row-parallel linear on
  for (const auto& linear : shape.linears) {
    if (half_begins) {
      needs_grad = needs_grad || half_trains;
      if (needs_grad) ++sums;  // into the column-parallel linears, backward
      half_trains = false;
    }
    half_begins = linear.row;
    half_trains = half_trains || trained.count(linear.name);
    if (!linear.row) continue;
    const bool again =
        checkpointing == Checkpointing::full || (checkpointing == Checkpointing::mlp && is_feed_forward(linear));
    sums += again ? 2 : 1;  // out of the row-parallel linear, forward
    if (again && is_feed_forward(linear)) needs_grad = true;
  }
  return sums;
}

}  // namespace

TrafficShape traffic_shape(Model& model, const AdapterConfig& adapter) {
  TrafficShape shape{model.hidden_size(), model.vocab_size(), model.num_layers(), {}, {}};
  for (const AdaptedLinear* linear : model.linears()) {
    const LinearSite& site = linear->site();
    const bool bias = linear->num_base_parameters() > site.in * site.out;
    shape.linears.push_back({site.name, site.in, site.out, site.split == Split::row, bias, site.role});
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
                                              const std::vector<BatchSize>& micro_batches, int64_t step) {
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
  if (data * tensor > 1) add(gradients, kMasterBytes * sizes.everywhere);
  if (data > 1) add(gradients, kMasterBytes * sizes.data);
  if (data > 1) add(Purpose::data_control, 16 + 8);      // counts of targets and tokens, loss
  if (data * tensor > 1) add(Purpose::data_control, 8);  // request to stop
  add(Purpose::adapter_statistics, method->statistics_bytes(trained, tensor, data, step));
  if (tensor == 1) return bytes;
  add(Purpose::gradient_norm, 8);
  for (const BatchSize& batch : micro_batches) {
    const int64_t sums = sums_per_token(shape, trained, full, checkpointing) * batch.tokens + batch.targets;
    add(Purpose::tensor_activations, sums * shape.hidden * activation_bytes);
    add(Purpose::vocabulary_loss, 3 * 4 * batch.targets);
  }
  return bytes;
}

}  // namespace corank
