#include "trainer/step.h"

#include <fmt/format.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "configs/error.h"

namespace corank {
namespace {

/// Sum of token losses of one micro-batch, a float64 scalar.
at::Tensor loss_sum(const Model& model, const ForwardContext& context) {
  const at::Tensor h_ND = model.forward(context);
  return ops::cross_entropy(h_ND, context.batch.target_rows_M, context.batch.targets_M, model.head(), context.tp);
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

}  // namespace

StepStats train_step(const StepParts& parts, const StepBatches& batches, int64_t step, const StepOptions& options) {
  const Mesh& mesh = parts.mesh;
  const Counts global = count_globally(batches, mesh.dp());
  const double share = 1.0 / static_cast<double>(std::max<int64_t>(1, global.targets));

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
  parts.method.on_step_end(step, parts.optimizer, mesh);
  parts.store.gradients().zero_();
  return stats;
}

EvalResult evaluate(const Mesh& mesh, const Model& model, const std::vector<Batch>& batches) {
  const at::AutoGradMode no_grad(false);
  const auto options = at::TensorOptions(at::kDouble).device(mesh.device());
  at::Tensor sums = at::zeros({3}, options);  // loss, targets found, targets
  for (const Batch& on_host : batches) {
    const Batch batch = on_host.to(mesh.device());
    SegmentAttention attention(batch);
    const at::Tensor h_ND = model.forward({batch, attention, mesh.tp()});
    sums.narrow(0, 0, 2).add_(ops::score(h_ND, batch.target_rows_M, batch.targets_M, model.head(), mesh.tp()));
    sums[2] += static_cast<double>(batch.num_targets());
  }
  mesh.dp().all_reduce(sums, ReduceOp::sum, Purpose::data_control);
  const at::Tensor host = sums.to(at::kCPU);
  const double targets = host[2].item<double>(), divisor = std::max(1.0, targets);
  return {host[0].item<double>() / divisor, host[1].item<double>() / divisor, static_cast<int64_t>(targets)};
}

}  // namespace corank
