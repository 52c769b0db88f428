#include "trainer/run/step.h"

#include <fmt/format.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "configs/error.h"

namespace corank {
namespace {

/// Sum of token losses of one micro-batch, a float64 scalar.
at::Tensor loss_sum(const Model& model, const ForwardContext& context) {
  const at::Tensor h_ND = model.forward(context);
  return model.task()->loss_sum(h_ND, context.batch.target_rows_M, context.batch.targets_M, context.tp);
}

/// Collective over the world, the step's one small message. float64 [2] on the device: the loss of the global batch,
/// and how many ranks want to stop. Ranks of a tensor-parallel group have the same loss: one of them hands it in.
at::Tensor tell_all(const at::Tensor& loss, const std::function<bool()>& stop, const Mesh& mesh) {
  const at::Tensor numbers = at::zeros({2}, loss.options());
  if (mesh.tp().rank() == 0) numbers[0].copy_(loss);
  if (stop && stop()) numbers[1].fill_(1);
  mesh.world().all_reduce(numbers, ReduceOp::sum, Purpose::data_control);
  return numbers;
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
StepStats read_stats(const at::Tensor& told, const at::Tensor& norm, const StepBatches& batches) {
  const at::Tensor host = at::cat({told, norm.view({1})}).to(at::kCPU);
  const double* n = host.const_data_ptr<double>();
  return {n[0], n[2], batches.num_targets, batches.num_tokens, n[1] > 0};
}

/// Whether the update was made.
bool is_sound(const StepStats& stats) { return std::isfinite(stats.loss) && std::isfinite(stats.grad_norm); }

void require_target(const StepBatches& batches, int64_t step) {
  if (batches.num_targets > 0) return;
  throw InputError(
      fmt::format("step {}: none of its {} tokens is a target, so there is nothing to learn from; nothing was changed.",
                  step, batches.num_tokens));
}

[[noreturn]] void refuse_step(const StepStats& stats, int64_t step) {
  throw InputError(
      fmt::format("step {}: loss {} and gradient norm {} are not both finite; nothing was changed. Lower "
                  "train.learning_rate or look at the data of this step.",
                  step, stats.loss, stats.grad_norm));
}

}  // namespace

StepStats train_step(const StepParts& parts, const StepBatches& batches, int64_t step, const StepOptions& options) {
  const Mesh& mesh = parts.mesh;
  const auto scalar = at::TensorOptions(at::kDouble).device(mesh.device());
  require_target(batches, step);
  const at::Tensor share = at::full({}, 1 / static_cast<double>(batches.num_targets), scalar);

  parts.dropout.begin(step);
  at::Tensor loss = at::zeros({}, scalar);
  for (const Batch& on_host : batches.micro_batches) {
    const Batch batch = on_host.to(mesh.device());
    SegmentAttention attention(batch);
    const ForwardContext context{batch, attention, mesh.tp(), &parts.dropout};
    const at::Tensor part = loss_sum(parts.model, context) * share;
    torch::autograd::backward({part}, {});
    loss += parts.sum.add_micro_batch(part.detach());
  }
  parts.sum.reduce();
  parts.method.add_gradients(step, mesh);
  const at::Tensor told = tell_all(loss, options.stop, mesh);

  const at::Tensor norm = gradient_norm(parts.store, mesh);
  clip(parts.store.gradients(), norm, options.max_grad_norm);
  parts.optimizer.step(options.learning_rate, parts.method.age_of_moments(step), not_finite(told[0], norm));
  const StepStats stats = read_stats(told, norm, batches);
  if (is_sound(stats) && parts.method.on_step_end(step, mesh)) parts.optimizer.restart();
  parts.sum.end_step(is_sound(stats));
  parts.store.gradients().zero_();
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

/// Of each column, row after row.
std::array<double, 3> sums_in_order(const at::Tensor& rows) {
  const at::Tensor host = rows.to(at::kCPU);
  const double* n = host.const_data_ptr<double>();
  std::array<double, 3> sums{};
  for (int64_t i = 0; i < host.numel(); ++i) sums[i % 3] += n[i];
  return sums;
}

}  // namespace

EvalResult evaluate(const Mesh& mesh, const Model& model, const std::vector<Batch>& batches) {
  const at::AutoGradMode no_grad(false);
  const Communicator& dp = mesh.dp();
  const auto count = static_cast<int64_t>(batches.size()) * dp.size();
  // By micro-batch: loss, targets found, targets. Each is one rank's, so that no order of ranks decides their sum.
  const at::Tensor scores = at::zeros({count, 3}, at::TensorOptions(at::kDouble).device(mesh.device()));
  for (size_t i = 0; i < batches.size(); ++i) {
    const Batch batch = batches[i].to(mesh.device());
    SegmentAttention attention(batch);
    const at::Tensor h_ND = model.forward({batch, attention, mesh.tp()});
    const at::Tensor score = scores[static_cast<int64_t>(i) * dp.size() + dp.rank()];
    score.narrow(0, 0, 2).copy_(model.task()->score(h_ND, batch.target_rows_M, batch.targets_M, mesh.tp()));
    score[2].fill_(batch.num_targets());
  }
  mesh.dp().all_reduce(scores, ReduceOp::sum, Purpose::data_control);
  const std::array<double, 3> sums = sums_in_order(scores);
  if (!std::isfinite(sums[0])) refuse_evaluation(mesh, model, batches);
  const double divisor = std::max(1.0, sums[2]);
  return {sums[0] / divisor, sums[1] / divisor, static_cast<int64_t>(sums[2])};
}

}  // namespace corank
