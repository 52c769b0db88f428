#include "launch/bench.h"

#include "trainer/ops/random.h"

namespace corank {
namespace {

/// The same random sequences for every layout: sequence s of the global batch draws from its own key.
Sample random_sample(int64_t length, int64_t vocab, uint64_t seed, int64_t sequence) {
  at::Tensor draws = at::empty({length}, at::TensorOptions(at::kDouble));
  ops::fill_uniform(draws, ops::key_of(seed, "bench", "tokens", sequence), 0, static_cast<double>(vocab), {length},
                    {0});
  return {draws.floor_().clamp_(0, static_cast<double>(vocab - 1)).to(at::kInt),
          at::ones({length}, at::TensorOptions(at::kByte))};
}

StepBatches random_batches(const RunConfig& run, const Mesh& mesh, int64_t vocab) {
  StepBatches step;
  const int64_t micro = run.train.micro_batch_size, count = run.train.global_batch_size / micro;
  const int64_t size = mesh.dp().size();
  for (int64_t first = 0; first < count; first += size) {
    const int64_t k = first + mesh.dp().rank();  // beyond the last: padding
    std::vector<std::vector<Sample>> rows;
    for (int64_t s = k * micro; k < count && s < (k + 1) * micro; ++s) {
      rows.push_back({random_sample(run.data.seq_len, vocab, static_cast<uint64_t>(run.train.seed), s)});
    }
    step.micro_batches.push_back(make_batch(rows, k * micro, run.data.seq_len));
  }
  step.num_tokens = count * micro * run.data.seq_len;
  step.num_targets = step.num_tokens - count * micro;  // all but each first
  return step;
}

}  // namespace

Bench::Bench(Session& session)
    : session_(session),
      optimizer_(session.store(), session.run().train.optimizer),
      sum_(make_gradient_sum(session)),
      dropout_(static_cast<uint64_t>(session.run().train.seed), session.mesh().device()) {
  const RunConfig& run = session.run();
  if (run.data.train.empty()) return;
  data_ = std::make_unique<TokenFile>(run.data.train);
  loader_ =
      std::make_unique<Loader>(*data_, run.loader_options(session.mesh().dp().rank(), session.mesh().dp().size()));
}

StepBatches Bench::next() {
  return loader_ ? loader_->next() : random_batches(session_.run(), session_.mesh(), session_.model().vocab_size());
}

StepStats Bench::step(const StepBatches& batches, int64_t number) {
  const RunConfig& run = session_.run();
  const StepParts parts{session_.mesh(), session_.model(), session_.method(), session_.store(), optimizer_,
                        *sum_,           dropout_};
  return train_step(parts, batches, number, {run.train.learning_rate, run.train.max_grad_norm, [] { return false; }});
}

}  // namespace corank
