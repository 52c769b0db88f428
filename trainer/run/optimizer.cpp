#include "trainer/run/optimizer.h"

namespace corank {

Optimizer::Optimizer(ParameterStore& store, OptimizerOptions options)
    : store_(store),
      options_(options),
      exp_avg_(at::zeros_like(store.masters())),
      exp_avg_sq_(at::zeros_like(store.masters())),
      step_(at::zeros({}, store.masters().options().dtype(at::kFloat))) {
  for (const auto& p : store.parameters()) {
    const double decay = p.spec.decays ? options.weight_decay : 0;
    const bool same =
        !groups_.empty() && groups_.back().weight_decay == decay && groups_.back().lr_scale == p.spec.lr_scale;
    if (same) {
      groups_.back().count += p.master.numel();
    } else {
      groups_.push_back({p.begin, p.master.numel(), decay, p.spec.lr_scale, ops::adamw_learning_rate(store.masters())});
    }
  }
}

void Optimizer::step(double learning_rate, int64_t step, const at::Tensor& skip) {
  step_.fill_(step);
  for (const Group& g : groups_) {
    const auto part = [&](const at::Tensor& flat) { return flat.narrow(0, g.begin, g.count); };
    g.learning_rate.fill_(learning_rate * g.lr_scale);
    ops::adamw(part(store_.masters()), part(store_.gradients()), part(exp_avg_), part(exp_avg_sq_), g.learning_rate,
               g.weight_decay, step_, options_.adamw, skip);
  }
  store_.refresh();
}

void Optimizer::restart() {
  exp_avg_.zero_();
  exp_avg_sq_.zero_();
}

at::Tensor gradient_norm(const ParameterStore& store, const Mesh& mesh) {
  const auto square = [](const at::Tensor& flat) {
    return at::linalg_vector_norm(flat, 2, {}, false, at::kDouble).square_();
  };
  at::Tensor replicated = at::zeros({}, store.gradients().options().dtype(at::kDouble));
  at::Tensor sharded = replicated.clone();
  const at::Tensor shared = store.gradients_of(GradientScope::summed);
  // Neighbours of one kind are one norm: two host calls instead of one a tensor.
  const auto& all = store.parameters();
  for (size_t i = 0; i < all.size() && all[i].spec.scope != GradientScope::summed;) {
    size_t end = i + 1;
    const auto alike = [&](const auto& other) {
      return other.spec.scope != GradientScope::summed && other.spec.shard.whole() == all[i].spec.shard.whole();
    };
    while (end < all.size() && alike(all[end])) ++end;
    const int64_t count = all[end - 1].begin + all[end - 1].master.numel() - all[i].begin;
    (all[i].spec.shard.whole() ? replicated : sharded).add_(square(store.gradients().narrow(0, all[i].begin, count)));
    i = end;
  }
  mesh.tp().all_reduce(sharded, ReduceOp::sum, Purpose::gradient_norm);
  replicated.add_(sharded);
  if (shared.numel() > 0) {
    const at::Tensor squares = square(shared);
    mesh.world().all_reduce(squares, ReduceOp::sum, Purpose::gradient_norm);
    replicated.add_(squares);
  }
  return replicated.sqrt_();
}

}  // namespace corank
