#include "trainer/run/traffic.h"

#include <algorithm>
#include <set>

#include "trainer/layers/cross_entropy.h"
#include "trainer/layers/model.h"
#include "trainer/methods/start.h"
#include "trainer/methods/targets.h"
#include "trainer/run/base_walk.h"
#include "trainer/weights/sharded.h"

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

/// The collectives of a step, as they are found. Groups of one rank and empty tensors have none.
class CollectiveList {
 public:
  CollectiveList(int tensor, int data) : tensor_(tensor), data_(data) {}

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
void add_loss(CollectiveList& list, int64_t targets, int64_t head_rows) {
  const int64_t chunk = rows_at_once(head_rows);
  for (int64_t begin = 0; begin < targets; begin += chunk) {
    const int64_t rows = std::min(chunk, targets - begin);
    list.add_sum(Purpose::vocabulary_loss, Axis::tp, rows, sizeof(float));
    list.add_sum(Purpose::vocabulary_loss, Axis::tp, 2 * rows, sizeof(float));
  }
}

void add_gather(CollectiveList& list, int64_t bytes) {
  list.add({Purpose::base_gathers, Axis::dp, {Collective::all_gather, bytes, 1}});
}

/// Weights that a method reads beside the passes of a step.
void add_apart(CollectiveList& list, const TrafficShape& shape, const std::set<std::string>& trained, int64_t reads) {
  for (size_t i = 0; i < shape.linears.size(); ++i) {
    for (int64_t read = 0; read < reads && trained.count(shape.linears[i].name); ++read) {
      add_gather(list, shape.stored[i].gather_bytes);
    }
  }
}

bool is_shared(const TrafficShape& shape) {
  return std::any_of(shape.stored.begin(), shape.stored.end(),
                     [](const StoredSize& weight) { return weight.gather_bytes > 0; });
}

/// Of the linears where they train: dense, whatever the base is stored in.
std::vector<StoredSize> stored_dense(const TrafficShape& shape, int tensor, int data, int element_bytes) {
  std::vector<StoredSize> stored = shape.stored;
  for (size_t i = 0; i < stored.size(); ++i) {
    const LinearSize& linear = shape.linears[i];
    stored[i].gather_bytes = share_of(linear.in * linear.out / tensor * element_bytes, data);
  }
  return stored;
}

/// The gradients of weights that ranks share go to those that own the parts, in each micro-batch.
void add_scatters(CollectiveList& list, const std::vector<StoredSize>& stored, int data, int element_bytes) {
  for (const StoredSize& weight : stored) {
    const int64_t elements = data * weight.gather_bytes / element_bytes;
    list.add({Purpose::weight_gradients, Axis::dp, {Collective::reduce_scatter, elements, sizeof(float)}});
  }
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

std::vector<StepCollective> predict_step(const TrafficShape& shape, const AdapterConfig& adapter, int tensor, int data,
                                         int activation_bytes, Checkpointing checkpointing,
                                         const std::vector<BatchSize>& micro_batches, int64_t step) {
  const auto method = make_method(adapter);
  const bool full = method->trains_base();
  const auto trained = trained_linears(shape, adapter, full);
  const bool shares_trained = full && is_shared(shape);
  GradientSizes sizes = other_gradients(shape, full);
  for (const LinearSize& linear : trained) {
    const GradientSizes one = method->gradient_sizes(linear, tensor);
    sizes.everywhere += one.everywhere;
    sizes.data += one.data - (shares_trained ? linear.in * linear.out / tensor : 0);
  }
  CollectiveList list(tensor, data);
  list.add_sum(method->gradient_purpose(), Axis::world, sizes.everywhere, sizeof(float));
  list.add_sum(method->gradient_purpose(), Axis::dp, sizes.data, sizeof(float));
  list.add_sum(Purpose::data_control, Axis::dp, 2, sizeof(int64_t));     // targets and tokens
  list.add_sum(Purpose::data_control, Axis::dp, 1, sizeof(double));      // loss
  list.add_sum(Purpose::data_control, Axis::world, 1, sizeof(int64_t));  // request to stop
  for (const StepCollective& collective : method->statistics(trained, step)) list.add(collective);
  list.add_sum(Purpose::gradient_norm, Axis::tp, 1, sizeof(double));
  if (shares_trained) list.add_sum(Purpose::gradient_norm, Axis::world, 1, sizeof(double));
  const auto stored = shares_trained ? stored_dense(shape, tensor, data, activation_bytes) : shape.stored;
  const std::set<std::string> names = names_of(trained);
  const auto halves = half_layers(shape, names, embedding_trains(shape, full), checkpointing);
  add_apart(list, shape, names, method->base_reads());
  for (const BatchSize& batch : micro_batches) {
    for (const int64_t bytes : base_gathers(stored, halves, checkpointing)) add_gather(list, bytes);
    if (shares_trained) add_scatters(list, stored, data, activation_bytes);
    const int64_t sums = sums_per_token(halves);
    list.add_sum(Purpose::tensor_activations, Axis::tp, batch.tokens * shape.hidden, activation_bytes, sums);
    add_loss(list, batch.targets, (shape.vocab + tensor - 1) / tensor);
    list.add_sum(Purpose::tensor_activations, Axis::tp, batch.targets * shape.hidden, activation_bytes);
  }
  return list.take();
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
