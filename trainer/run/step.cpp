#include "trainer/run/step.h"

#include <fmt/format.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>

#include "configs/error.h"

namespace corank {
namespace {

/// Sum of token losses of one micro-batch, a float64 scalar.
at::Tensor loss_sum(const Model& model, const ForwardContext& context) {
  const at::Tensor h_ND = model.forward(context);
  return cross_entropy(h_ND, context.batch.target_rows_M, context.batch.targets_M, model.head(), context.tp);
}

struct Counts {
  int64_t targets, tokens;
};

/// Collective over dp. Targets and tokens of the global batch.
Counts count_globally(const StepBatches& batches, Communicator& dp) {
  at::Tensor counts = at::tensor({batches.num_targets, batches.num_tokens}, at::kLong).to(dp.device());
  dp.all_reduce(counts, ReduceOp::sum, Purpose::data_control);
  counts = counts.to(at::kCPU);
  return {counts[0].item<int64_t>(), counts[1].item<int64_t>()};
}

void require_targets(const Counts& global, int64_t step) {
  if (global.targets > 0) return;
  throw InputError(
      fmt::format("step {}: none of its {} tokens is a target, so there is nothing to learn from; nothing was changed.",
                  step, global.tokens));
}

}  // namespace

StepStats train_step(const StepParts& parts, const StepBatches& batches, int64_t step, const StepOptions& options) {
  const Mesh& mesh = parts.mesh;
  const Counts global = count_globally(batches, mesh.dp());
  require_targets(global, step);
  const double share = 1.0 / static_cast<double>(global.targets);

  at::Tensor loss = at::zeros({}, at::TensorOptions(at::kDouble).device(mesh.device()));
  for (const Batch& on_host : batches.micro_batches) {
    const Batch batch = on_host.to(mesh.device());
    SegmentAttention attention(batch);
    const ForwardContext context{batch, attention, mesh.tp(), /*training=*/true, options.seed, step};
    const at::Tensor part = loss_sum(parts.model, context) * share;
    torch::autograd::backward({part}, {});
    loss += part.detach();
  }
  parts.reducer.reduce();
  mesh.dp().all_reduce(loss, ReduceOp::sum, Purpose::data_control);
  parts.method.add_gradients(step, mesh);

  const at::Tensor norm = gradient_norm(parts.store, mesh.tp());
  const at::Tensor read = at::stack({loss, norm}).to(at::kCPU);  // the step's one wait for the device
  const StepStats stats{read[0].item<double>(), read[1].item<double>(), global.targets, global.tokens};
  if (!std::isfinite(stats.loss) || !std::isfinite(stats.grad_norm)) {
    throw InputError(
        fmt::format("step {}: loss {} and gradient norm {} are not both finite; nothing was changed. Lower "
                    "train.learning_rate or look at the data of this step.",
                    step, stats.loss, stats.grad_norm));
  }
  // torch.nn.utils.clip_grad_norm_'s factor
  const double clip = options.max_grad_norm / (stats.grad_norm + 1e-6);
  if (options.max_grad_norm > 0 && clip < 1) parts.store.gradients().mul_(clip);
  parts.optimizer.step(options.learning_rate, parts.method.age_of_moments(step));
  if (parts.method.on_step_end(step, mesh)) parts.optimizer.restart();
  parts.store.gradients().zero_();
  return stats;
}

namespace {

/// Collective over tp. The lowest number of a sample of `batch`, which is on the device, whose loss is not finite;
/// INT64_MAX if there is none.
int64_t lowest_not_finite(const Model& model, const Batch& batch, Communicator& tp) {
  SegmentAttention attention(batch);
  const at::Tensor h_ND = model.forward({batch, attention, tp});
  const at::Tensor host_rows_M = batch.target_rows_M.to(at::kCPU);
  const int64_t* rows = host_rows_M.const_data_ptr<int64_t>();
  int64_t target = 0, end_row = 0, lowest = INT64_MAX;
  for (size_t s = 0; s < batch.lengths.size(); ++s) {
    end_row += batch.lengths[s];
    const int64_t first = target;
    while (target < batch.num_targets() && rows[target] < end_row) ++target;
    const at::Tensor sums = score(h_ND, batch.target_rows_M.narrow(0, first, target - first),
                                  batch.targets_M.narrow(0, first, target - first), model.head(), tp);
    if (!std::isfinite(sums[0].item<double>())) lowest = std::min(lowest, batch.samples[s]);
  }
  return lowest;
}

/// Collective over the world: goes through `batches` again to say where the loss that is not finite comes from.
[[noreturn]] void refuse_evaluation(const Mesh& mesh, const Model& model, const std::vector<Batch>& batches) {
  int64_t lowest = INT64_MAX;
  for (const Batch& batch : batches) {
    lowest = std::min(lowest, lowest_not_finite(model, batch.to(mesh.device()), mesh.tp()));
  }
  const at::Tensor sample = at::full({1}, lowest, at::TensorOptions(at::kLong).device(mesh.device()));
  mesh.dp().all_reduce(sample, ReduceOp::min, Purpose::data_control);
  throw InputError(fmt::format(
      "data.eval: the loss of sample {} is not finite, and no sample before it has such a loss (samples count from 0). "
      "The weights or the adapter are damaged or have diverged, or numbers exceed model.dtype: look at the adapter "
      "with corank inspect, take an earlier checkpoint or model.dtype: float32.",
      sample.item<int64_t>()));
}

}  // namespace

EvalResult evaluate(const Mesh& mesh, const Model& model, const std::vector<Batch>& batches) {
  const at::AutoGradMode no_grad(false);
  const auto options = at::TensorOptions(at::kDouble).device(mesh.device());
  at::Tensor sums = at::zeros({3}, options);  // loss, targets found, targets
  for (const Batch& on_host : batches) {
    const Batch batch = on_host.to(mesh.device());
    SegmentAttention attention(batch);
    const at::Tensor h_ND = model.forward({batch, attention, mesh.tp()});
    sums.narrow(0, 0, 2).add_(score(h_ND, batch.target_rows_M, batch.targets_M, model.head(), mesh.tp()));
    sums[2] += static_cast<double>(batch.num_targets());
  }
  mesh.dp().all_reduce(sums, ReduceOp::sum, Purpose::data_control);
  const at::Tensor host = sums.to(at::kCPU);
  if (!std::isfinite(host[0].item<double>())) refuse_evaluation(mesh, model, batches);
  const double targets = host[2].item<double>(), divisor = std::max(1.0, targets);
  return {host[0].item<double>() / divisor, host[1].item<double>() / divisor, static_cast<int64_t>(targets)};
}

}  // namespace corank
