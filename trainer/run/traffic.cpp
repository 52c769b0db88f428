#include "trainer/run/traffic.h"

#include <algorithm>
#include <set>

#include "trainer/layers/cross_entropy.h"
#include "trainer/layers/model.h"
#include "trainer/methods/start.h"
#include "trainer/methods/targets.h"

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

/// The collectives of a step, as they are found. Groups of one rank and empty tensors have none.
class StepPlan {
 public:
  StepPlan(int tensor, int data) : tensor_(tensor), data_(data) {}

  void add(const StepCollective& collective) {
    if (ranks(collective.axis) > 1 && collective.transfer.elements > 0) collectives_.push_back(collective);
  }
  void add_sum(Purpose purpose, Axis axis, int64_t elements, int64_t element_bytes, int64_t calls = 1) {
    add({purpose, axis, {Collective::all_reduce, elements, element_bytes}, calls});
  }
  std::vector<StepCollective> take() { return std::move(collectives_); }

 private:
  int ranks(Axis axis) const { return axis == Axis::dp ? data_ : axis == Axis::tp ? tensor_ : data_ * tensor_; }

  int tensor_, data_;
  std::vector<StepCollective> collectives_;
};

/// The statistics of the softmax travel with each chunk of logits.
void add_loss(StepPlan& plan, int64_t targets, int64_t head_rows) {
  const int64_t chunk = rows_at_once(head_rows);
  for (int64_t begin = 0; begin < targets; begin += chunk) {
    const int64_t rows = std::min(chunk, targets - begin);
    plan.add_sum(Purpose::vocabulary_loss, Axis::tp, rows, sizeof(float));
    plan.add_sum(Purpose::vocabulary_loss, Axis::tp, 2 * rows, sizeof(float));
  }
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

std::vector<StepCollective> predict_step(const TrafficShape& shape, const AdapterConfig& adapter, int tensor, int data,
                                         int activation_bytes, Checkpointing checkpointing,
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
  StepPlan plan(tensor, data);
  plan.add_sum(method->gradient_purpose(), Axis::world, sizes.everywhere, sizeof(float));
  plan.add_sum(method->gradient_purpose(), Axis::dp, sizes.data, sizeof(float));
  plan.add_sum(Purpose::data_control, Axis::dp, 2, sizeof(int64_t));     // targets and tokens
  plan.add_sum(Purpose::data_control, Axis::dp, 1, sizeof(double));      // loss
  plan.add_sum(Purpose::data_control, Axis::world, 1, sizeof(int64_t));  // request to stop
  for (const StepCollective& collective : method->statistics(trained, step)) plan.add(collective);
  plan.add_sum(Purpose::gradient_norm, Axis::tp, 1, sizeof(double));
  const int64_t sums = sums_per_token(shape, trained, full, checkpointing);
  for (const BatchSize& batch : micro_batches) {
    plan.add_sum(Purpose::tensor_activations, Axis::tp, batch.tokens * shape.hidden, activation_bytes, sums);
    add_loss(plan, batch.targets, (shape.vocab + tensor - 1) / tensor);
    plan.add_sum(Purpose::tensor_activations, Axis::tp, batch.targets * shape.hidden, activation_bytes);
  }
  return plan.take();
}

std::map<Purpose, int64_t> payload_by_purpose(const std::vector<StepCollective>& collectives) {
  std::map<Purpose, int64_t> bytes;
  for (const auto& [purpose, axis, transfer, calls] : collectives) bytes[purpose] += calls * transfer.payload_bytes();
  return bytes;
}

Ledger::Snapshot traffic_by_purpose(const std::vector<StepCollective>& collectives,
                                    const std::function<Ring(Axis)>& ring) {
  Ledger ledger;
  for (const auto& [purpose, axis, transfer, calls] : collectives) {
    const Traffic one = ring_traffic(transfer, ring(axis));
    for (int64_t call = 0; call < calls; ++call) ledger.record(purpose, one);
  }
  return ledger.snapshot();
}

}  // namespace corank
