#include "launch/outline.h"

#include <algorithm>
#include <map>

#include "comm/backends.h"
#include "trainer/methods/start.h"
#include "trainer/weights/sharded.h"

namespace corank {
namespace {

int64_t outline_elements(const std::vector<int64_t>& sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  return count;
}

int64_t saved_bytes(const std::vector<NamedWeight>& weights) {
  int64_t bytes = 0;
  for (const NamedWeight& weight : weights) bytes += static_cast<int64_t>(weight.weight->value.nbytes());
  return bytes;
}

/// Of the blocks' linears. Every rank has the whole bias of a row-parallel one.
int64_t bias_bytes(const Outline& outline, at::ScalarType dtype) {
  int64_t elements = 0;
  for (const LinearSize& linear : outline.shape.linears) {
    if (linear.bias) elements += linear.row ? linear.out : linear.out / outline.tensor;
  }
  return elements * static_cast<int64_t>(c10::elementSize(dtype));
}

/// Neighbours in the order of forward are whole at a time (trainer/weights/sharded.h).
void add_linears(Model& model, Outline& outline) {
  std::map<int64_t, int64_t> gathered;  // bytes by order
  for (const AdaptedLinear* linear : model.linears()) {
    const int64_t part = linear->weight().gather_bytes();
    outline.linear_bytes += part > 0 ? part * outline.data : linear->weight().bytes();
    gathered[linear->weight().order()] += part * outline.data;
  }
  for (auto first = gathered.begin(); first != gathered.end(); ++first) {
    int64_t bytes = 0;
    auto one = first;
    for (size_t i = 0; i < Slots::kSlots && one != gathered.end(); ++i) bytes += (one++)->second;
    outline.gathered_bytes = std::max(outline.gathered_bytes, bytes);
  }
}

}  // namespace

Outline outline_of(const RunConfig& run, int tensor, int data) {
  check_model_config(model_config_json(run.model), run.model.path.empty() ? run.model.shape : run.model.path, tensor);
  Ledger ledger;
  const auto tp = make_outline_communicator(tensor, ledger), dp = make_outline_communicator(data, ledger);
  ModelOptions options = run.model;
  options.residency = make_residency(run.parallel.shard_base, *dp);
  const auto model = outline_model(options, *tp);
  const auto method = make_method(run.adapter);
  Outline outline;
  outline.tensor = tensor;
  outline.data = data;
  outline.shape = traffic_shape(*model, run.adapter);
  outline.head_dim = model->head_dim();
  outline.base_parameters = num_base_parameters(*model);
  if (!method->trains_base()) {
    outline.frozen_bytes =
        base_bytes(*model) + bias_bytes(outline, run.model.dtype) - saved_bytes(saved_modules(*model, run.adapter));
  }
  add_linears(*model, outline);
  ParameterStore store;
  register_parameters(*method, *model, store, 0);
  for (const auto& parameter : store.parameters()) {
    outline.trained += outline_elements(parameter.spec.shape);
    const int64_t block = outline_elements(parameter.spec.shard.local_shape(parameter.spec.shape));
    outline.trained_here += parameter.spec.share ? parameter.spec.share->part_elements(block) : block;
  }
  return outline;
}

RunConfig as_full_fine_tuning(RunConfig run) {
  run.adapter = {};
  run.adapter.method = "full";
  run.adapter_keys.clear();
  run.model.quantization = "none";
  run.train.reproducible = false;  // which is for adapters
  return run;
}

}  // namespace corank
