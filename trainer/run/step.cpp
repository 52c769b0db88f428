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
  return model.task()->loss_sum(h_ND, context.batch.target_rows_M, context.batch.targets_M, context.tp);
}

/// Collective over dp. Targets and tokens of the global batch: int64 [2] on the device.
at::Tensor count_globally(const StepBatches& batches, Communicator& dp) {
  const at::Tensor counts = at::empty({2}, at::TensorOptions(at::kLong).device(dp.device()));
  counts[0].fill_(batches.num_targets);
  counts[1].fill_(batches.num_tokens);
  dp.all_reduce(counts, ReduceOp::sum, Purpose::data_control);
  return counts;
}

/// Collective over the world where anybody asks. Whether some rank wants to stop: int64 [1] on the device.
at::Tensor stop_flag(const std::function<bool()>& stop, Communicator& world) {
  at::Tensor flag = at::full({1}, stop && stop() ? 1 : 0, at::TensorOptions(at::kLong).device(world.device()));
  if (stop) world.all_reduce(flag, ReduceOp::max, Purpose::data_control);
  return flag;
}

/// Scales the gradients as torch.nn.utils.clip_grad_norm_ does; a factor of 1 keeps their bits.
void clip(const at::Tensor& gradients, const at::Tensor& norm, double max_norm) {
  if (max_norm > 0) gradients.mul_(at::full_like(norm, max_norm).div_(norm + 1e-6).clamp_max_(1));
}

/// 1 where one of the numbers is not finite, else 0: what the optimizer takes.
at::Tensor not_finite(const at::Tensor& loss, const at::Tensor& norm) {
  return at::isfinite(loss).logical_and_(at::isfinite(norm)).logical_not_().to(at::kFloat);
}

/// The step's one wait for the device.
StepStats read_stats(const at::Tensor& loss, const at::Tensor& norm, const at::Tensor& counts, const at::Tensor& stop) {
  const at::Tensor numbers = at::cat({at::stack({loss, norm}), counts.to(at::kDouble), stop.to(at::kDouble)});
  const at::Tensor host = numbers.to(at::kCPU);
  const double* n = host.const_data_ptr<double>();
  return {n[0], n[1], static_cast<int64_t>(n[2]), static_cast<int64_t>(n[3]), n[4] != 0};
}

/// Whether the update was made.
bool is_sound(const StepStats& stats) {
  return stats.target_tokens > 0 && std::isfinite(stats.loss) && std::isfinite(stats.grad_norm);
}

[[noreturn]] void refuse_step(const StepStats& stats, int64_t step) {
  if (stats.target_tokens == 0) {
    throw InputError(fmt::format(
        "step {}: none of its {} tokens is a target, so there is nothing to learn from; nothing was changed.", step,
        stats.tokens));
  }
  throw InputError(
      fmt::format("step {}: loss {} and gradient norm {} are not both finite; nothing was changed. Lower "
                  "train.learning_rate or look at the data of this step.",
                  step, stats.loss, stats.grad_norm));
}

}  // namespace

StepStats train_step(const StepParts& parts, const StepBatches& batches, int64_t step, const StepOptions& options) {
  const Mesh& mesh = parts.mesh;
  const at::Tensor& gradients = parts.store.gradients();
  const at::Tensor counts = count_globally(batches, mesh.dp());
  const at::Tensor share = counts[0].to(at::kDouble).reciprocal_();

  parts.dropout.begin(step);
  at::Tensor loss = at::zeros({}, at::TensorOptions(at::kDouble).device(mesh.device()));
  for (const Batch& on_host : batches.micro_batches) {
    const Batch batch = on_host.to(mesh.device());
    SegmentAttention attention(batch);
    const ForwardContext context{batch, attention, mesh.tp(), &parts.dropout};
    const at::Tensor part = loss_sum(parts.model, context) * share;
    torch::autograd::backward({part}, {});
    loss += part.detach();
  }
  parts.reducer.reduce();
  mesh.dp().all_reduce(loss, ReduceOp::sum, Purpose::data_control);
  parts.method.add_gradients(step, mesh);

  const at::Tensor norm = gradient_norm(parts.store, mesh);
  clip(gradients, norm, options.max_grad_norm);
  parts.optimizer.step(options.learning_rate, parts.method.age_of_moments(step), not_finite(loss, norm));
  const StepStats stats = read_stats(loss, norm, counts, stop_flag(options.stop, mesh.world()));
  if (is_sound(stats) && parts.method.on_step_end(step, mesh)) parts.optimizer.restart();
  gradients.zero_();
  if (!is_sound(stats)) refuse_step(stats, step);
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
    const at::Tensor sums = model.task()->score(h_ND, batch.target_rows_M.narrow(0, first, target - first),
                                                batch.targets_M.narrow(0, first, target - first), tp);
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
    sums.narrow(0, 0, 2).add_(model.task()->score(h_ND, batch.target_rows_M, batch.targets_M, mesh.tp()));
    sums[2] += static_cast<double>(batch.num_targets());
  }
  mesh.dp().all_reduce(sums, ReduceOp::sum, Purpose::data_control);
  const at::Tensor host = sums.to(at::kCPU);
  if (!std::isfinite(host[0].item<double>())) refuse_evaluation(mesh, model, batches);
  const double targets = host[2].item<double>(), divisor = std::max(1.0, targets);
  return {host[0].item<double>() / divisor, host[1].item<double>() / divisor, static_cast<int64_t>(targets)};
}

}  // namespace corank
