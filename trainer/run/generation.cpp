#include "trainer/run/generation.h"

#include <fmt/format.h>

#include <algorithm>

#include "configs/error.h"
#include "trainer/ops/attention.h"
#include "trainer/ops/random.h"

namespace corank {
namespace {

/// Keys and values of all layers so far.
class CachedAttention : public AttentionCore {
 public:
  explicit CachedAttention(int64_t num_layers) : keys_(num_layers), values_(num_layers) {}

  at::Tensor attend(int64_t layer, const at::Tensor& q_NHd, const at::Tensor& k_NKd, const at::Tensor& v_NKd,
                    const ops::AttentionRule& rule) override {
    append(keys_[layer], k_NKd);
    append(values_[layer], v_NKd);
    return ops::cached_attention(q_NHd, keys_[layer], values_[layer], rule);
  }

 private:
  static void append(at::Tensor& cache, const at::Tensor& rows) {
    cache = cache.defined() ? at::cat({cache, rows}, 0) : rows;
  }
  std::vector<at::Tensor> keys_, values_;
};

/// Consecutive tokens of one sequence, from position `start`.
Batch span(const std::vector<int64_t>& tokens, int64_t start, at::Device device) {
  const auto count = static_cast<int64_t>(tokens.size());
  Batch batch;
  batch.tokens_N = at::tensor(tokens, at::TensorOptions(at::kLong)).to(device);
  batch.positions_N = at::arange(start, start + count, at::TensorOptions(at::kLong).device(device));
  batch.slots_N = batch.positions_N;
  batch.cu_seqlens = at::tensor({int64_t{0}, count}, at::TensorOptions(at::kInt)).to(device);
  batch.lengths = {count};
  batch.max_length = count;
  return batch;
}

/// The smallest set of tokens whose probabilities reach top_p, drawn by one uniform number.
int64_t sample(const at::Tensor& logits_V, const GenerationOptions& options, int64_t position) {
  auto [sorted, order] = at::softmax((logits_V - logits_V.max()).to(at::kDouble) / options.temperature, 0)
                             .sort(/*dim=*/0, /*descending=*/true);
  const at::Tensor cumulative = sorted.cumsum(0, at::kDouble).contiguous();
  const double* sums = cumulative.const_data_ptr<double>();
  const double* end = sums + cumulative.numel();
  const auto kept = std::min<int64_t>(std::lower_bound(sums, end, options.top_p) - sums, cumulative.numel() - 1);
  at::Tensor draw = at::empty({1}, at::TensorOptions(at::kDouble));
  ops::fill_uniform(draw, ops::key_of(options.seed, "sample", "token", position), 0, sums[kept], {1}, {0});
  const auto chosen = std::lower_bound(sums, sums + kept, draw.item<double>()) - sums;
  return order[chosen].item<int64_t>();
}

void require_finite(const at::Tensor& logits_V, int64_t position, size_t num_prompt) {
  if (logits_V.isfinite().all().item<bool>()) return;
  throw InputError(fmt::format(
      "generation: the logits for position {} (from 0; the prompt has {} tokens) are not all finite, so no token "
      "can be chosen. The weights or the adapter are damaged or have diverged, or numbers exceed model.dtype: take an "
      "earlier "
      "checkpoint or model.dtype: float32.",
      position, num_prompt));
}

}  // namespace

std::vector<int64_t> generate(const Model& model, const std::vector<int64_t>& prompt, const GenerationOptions& options,
                              Communicator& tp) {
  const at::AutoGradMode no_grad(false);
  CachedAttention attention(model.num_layers());
  std::vector<int64_t> result, pending = prompt;
  int64_t position = 0;
  while (static_cast<int64_t>(result.size()) < options.max_new_tokens) {
    const Batch batch = span(pending, position, tp.device());
    position += batch.num_tokens();
    const at::Tensor h_ND = model.forward({batch, attention, tp});
    const at::Tensor last_1D = h_ND.narrow(0, h_ND.size(0) - 1, 1);
    const at::Tensor logits_V = full_logits(last_1D, model.head(), tp)[0].to(at::kCPU);
    require_finite(logits_V, position, prompt.size());
    const int64_t token =
        options.temperature > 0 ? sample(logits_V, options, position) : logits_V.argmax().item<int64_t>();
    result.push_back(token);
    if (std::find(options.stop_tokens.begin(), options.stop_tokens.end(), token) != options.stop_tokens.end()) break;
    pending = {token};
  }
  return result;
}

at::Tensor all_logits(const Model& model, const std::vector<int64_t>& tokens, Communicator& tp) {
  const at::AutoGradMode no_grad(false);
  const Batch batch = span(tokens, 0, tp.device());
  SegmentAttention attention(batch);
  return full_logits(model.forward({batch, attention, tp}), model.head(), tp);
}

}  // namespace corank
