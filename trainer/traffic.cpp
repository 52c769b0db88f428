#include "trainer/traffic.h"

#include <set>

#include "trainer/model/model.h"

namespace corank {
namespace {

constexpr int64_t kMasterBytes = 4;

/// Elements of this rank's gradients: summed over dp x tp, and over dp.
struct GradientSizes {
  int64_t everywhere = 0, data = 0;
};

GradientSizes full_gradients(const TrafficShape& shape, int tensor) {
  GradientSizes sizes;
  for (const auto& linear : shape.linears) {
    sizes.data += linear.in * linear.out / tensor;
    if (linear.bias) (linear.row ? sizes.everywhere : sizes.data) += linear.row ? linear.out : linear.out / tensor;
  }
  sizes.everywhere += shape.other_partial;
  sizes.data +=
      shape.vocabulary_matrices * ((shape.vocab + tensor - 1) / tensor) * shape.hidden + shape.other_replicated;
  return sizes;
}

std::set<std::string> trained_linears(const TrafficShape& shape, const AdapterConfig& adapter, bool full) {
  std::vector<std::string> names;
  for (const auto& linear : shape.linears) names.push_back(linear.name);
  if (!full) names = select_targets(adapter, names);
  return {names.begin(), names.end()};
}

/// LoRA: column-parallel A and row-parallel B are replicated partial sums, the others sharded.
GradientSizes lora_gradients(const TrafficShape& shape, const AdapterConfig& adapter, int tensor) {
  const auto chosen = trained_linears(shape, adapter, /*full=*/false);
  GradientSizes sizes;
  for (const auto& linear : shape.linears) {
    if (!chosen.count(linear.name)) continue;
    const int64_t rank = adapter.rank_of(linear.name);
    sizes.everywhere += rank * (linear.row ? linear.out : linear.in);
    sizes.data += rank * (linear.row ? linear.in : linear.out) / tensor;
  }
  return sizes;
}

/// [N, D] sums that tensor-parallel ranks make for each token of a micro-batch.
int64_t sums_per_token(const TrafficShape& shape, const AdapterConfig& adapter, Checkpointing checkpointing) {
  const bool full = adapter.method == "full";
  const auto trained = trained_linears(shape, adapter, full);
  int64_t sums = 1;        // the embedding
  bool needs_grad = full;  // of the block's input: something below it trains, or is run again
  std::string block;       // ...self_attn or ...mlp
  bool block_trains = false;
  for (const auto& linear : shape.linears) {
    const std::string current = linear.name.substr(0, linear.name.rfind('.'));
    if (current != block) {
      needs_grad = needs_grad || block_trains;
      if (needs_grad) ++sums;  // into the column-parallel linears, backward
      block = current;
      block_trains = false;
    }
    block_trains = block_trains || trained.count(linear.name);
    if (!linear.row) continue;
    const bool again =
        checkpointing == Checkpointing::full || (checkpointing == Checkpointing::mlp && block.ends_with("mlp"));
    sums += again ? 2 : 1;  // out of the row-parallel linear, forward
    if (again && block.ends_with("mlp")) needs_grad = true;
  }
  return sums;
}

}  // namespace

TrafficShape traffic_shape(Model& model) {
  TrafficShape shape{model.hidden_size(), model.vocab_size(), model.num_layers(), {}, 0, 0, 0};
  for (const AdaptedLinear* linear : model.linears()) {
    const LinearSite& site = linear->site();
    const bool bias = linear->num_base_parameters() > site.in * site.out;
    shape.linears.push_back({site.name, site.in, site.out, site.split == Split::row, bias});
  }
  for (const NamedWeight& weight : model.other_weights()) {
    if (!weight.shard.whole()) {
      ++shape.vocabulary_matrices;
    } else {
      const int64_t size = weight.weight->value.numel();
      (weight.scope == GradientScope::data ? shape.other_replicated : shape.other_partial) += size;
    }
  }
  return shape;
}

std::map<Purpose, int64_t> predict_step_bytes(const TrafficShape& shape, const AdapterConfig& adapter, int tensor,
                                              int data, int activation_bytes, Checkpointing checkpointing,
                                              const std::vector<BatchSize>& micro_batches) {
  const bool full = adapter.method == "full";
  const GradientSizes sizes = full ? full_gradients(shape, tensor) : lora_gradients(shape, adapter, tensor);
  std::map<Purpose, int64_t> bytes;
  const auto add = [&](Purpose purpose, int64_t count) {
    if (count > 0) bytes[purpose] += count;
  };
  const Purpose gradients = full ? Purpose::weight_gradients : Purpose::adapter_gradients;
  if (data * tensor > 1) add(gradients, kMasterBytes * sizes.everywhere);
  if (data > 1) add(gradients, kMasterBytes * sizes.data);
  if (data > 1) add(Purpose::data_control, 16 + 8);      // counts of targets and tokens, loss
  if (data * tensor > 1) add(Purpose::data_control, 8);  // request to stop
  if (tensor == 1) return bytes;
  add(Purpose::gradient_norm, 8);
  for (const BatchSize& batch : micro_batches) {
    const int64_t sums = sums_per_token(shape, adapter, checkpointing) * batch.tokens + batch.targets;
    add(Purpose::tensor_activations, sums * shape.hidden * activation_bytes);
    add(Purpose::vocabulary_loss, 3 * 4 * batch.targets);
  }
  return bytes;
}

}  // namespace corank
