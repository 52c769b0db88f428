#include "trainer/ops/attention.h"

#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "trainer/ops/cuda.h"

namespace corank::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// [T, H, d] of one segment -> [1, H, T, d].
at::Tensor heads_first(const at::Tensor& x_THd) { return x_THd.transpose(0, 1).unsqueeze(0); }
at::Tensor tokens_first(const at::Tensor& x_1HTd) { return x_1HTd.squeeze(0).transpose(0, 1); }

/// 0 where the last `queries` of `keys` tokens may look, -inf elsewhere.
at::Tensor causal_mask(int64_t queries, int64_t keys, int64_t window, const at::TensorOptions& options) {
  const int64_t offset = keys - queries;
  const at::Tensor hidden = at::full({queries, keys}, -std::numeric_limits<double>::infinity(), options);
  const at::Tensor future = hidden.triu(offset + 1);
  return window > 0 ? future + hidden.tril_(offset - window) : future;
}

constexpr int64_t kKeys = int64_t{1} << 20;  // places of keys that dropout tells apart in a head

/// Probabilities [1, H, T, T] of one segment, whose tokens are `dropout.slots_N`.
at::Tensor drop(const at::Tensor& p_1HTT, const AttentionRule& rule) {
  if (!rule.dropout.active()) return p_1HTT;
  variable_list heads;
  for (int64_t head = 0; head < p_1HTT.size(1); ++head) {
    Dropout dropout = rule.dropout;
    dropout.feature_offset = (rule.first_head + head) * kKeys;
    heads.push_back(dropout_node(p_1HTT[0][head], dropout));
  }
  return at::stack(heads).unsqueeze(0);
}

/// Plain attention of the last rows of one sequence.
at::Tensor plain_segment(const at::Tensor& q_NHd, const at::Tensor& k_TKd, const at::Tensor& v_TKd,
                         const AttentionRule& rule) {
  const int64_t group = q_NHd.size(1) / k_TKd.size(1);
  const auto dtype = q_NHd.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor q = heads_first(q_NHd).to(dtype);
  const at::Tensor k = heads_first(k_TKd).repeat_interleave(group, 1).to(dtype);
  const at::Tensor v = heads_first(v_TKd).repeat_interleave(group, 1).to(dtype);
  at::Tensor scores = at::matmul(q, k.transpose(-1, -2)) * rule.scale;
  if (rule.causal) scores = scores + causal_mask(q.size(2), k.size(2), rule.window, q.options());
  return tokens_first(at::matmul(drop(at::softmax(scores, -1), rule), v)).to(q_NHd.scalar_type());
}

struct AttentionCall : torch::CustomClassHolder {
  Segments segments;
  AttentionRule rule;

  /// True if some token of a segment this long does not see all before it.
  bool window_cuts(int64_t length) const { return rule.window > 0 && length > rule.window; }
  /// Of a whole segment; absent where the kernels' own rule, causal or not, says it all.
  std::optional<at::Tensor> mask(int64_t length, const at::TensorOptions& options) const {
    if (!window_cuts(length)) return std::nullopt;
    return causal_mask(length, length, rule.window, options);
  }
};

/// One way to compute all segments. `kept` is what its backward needs beside q, k, v, out.
struct Kernel {
  at::Tensor (*forward)(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionCall& call,
                        variable_list& kept);
  variable_list (*backward)(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const at::Tensor& out, const AttentionCall& call, const variable_list& kept);
};

at::Tensor cpu_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionCall& call,
                       variable_list& kept) {
  at::Tensor out = at::empty_like(q);
  int64_t start = 0;
  for (int64_t length : call.segments.lengths) {
    const auto part = [&](const at::Tensor& x) { return heads_first(x.narrow(0, start, length)); };
    const auto mask = call.mask(length, q.options());
    auto [o, lse] =
        at::_scaled_dot_product_flash_attention_for_cpu(part(q), part(k), part(v), /*dropout_p=*/0,
                                                        /*is_causal=*/call.rule.causal && !mask, mask, call.rule.scale);
    out.narrow(0, start, length).copy_(tokens_first(o));
    kept.push_back(lse);
    start += length;
  }
  return out;
}

variable_list cpu_backward(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const at::Tensor& out, const AttentionCall& call, const variable_list& kept) {
  variable_list grads{at::empty_like(q), at::empty_like(k), at::empty_like(v)};
  int64_t start = 0;
  for (size_t s = 0; s < call.segments.lengths.size(); ++s) {
    const int64_t length = call.segments.lengths[s];
    const auto part = [&](const at::Tensor& x) { return heads_first(x.narrow(0, start, length)); };
    const auto mask = call.mask(length, q.options());
    auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        part(grad), part(q), part(k), part(v), part(out), kept[s], /*dropout_p=*/0,
        /*is_causal=*/call.rule.causal && !mask, mask, call.rule.scale);
    grads[0].narrow(0, start, length).copy_(tokens_first(dq));
    grads[1].narrow(0, start, length).copy_(tokens_first(dk));
    grads[2].narrow(0, start, length).copy_(tokens_first(dv));
    start += length;
  }
  return grads;
}

at::Tensor plain_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionCall& call,
                         variable_list&) {
  variable_list outputs;
  int64_t start = 0;
  for (int64_t length : call.segments.lengths) {
    const auto part = [&](const at::Tensor& x) { return x.narrow(0, start, length); };
    AttentionRule rule = call.rule;
    if (rule.dropout.active()) rule.dropout.slots_N = part(rule.dropout.slots_N);
    outputs.push_back(plain_segment(part(q), part(k), part(v), rule));
    start += length;
  }
  return at::cat(outputs, 0);
}

/// The plain formula again under autograd: slow and obviously right, for what no kernel takes.
variable_list plain_backward(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor&, const AttentionCall& call, const variable_list&) {
  const at::AutoGradMode grad_mode(true);
  variable_list inputs{q.detach().requires_grad_(), k.detach().requires_grad_(), v.detach().requires_grad_()};
  variable_list kept;
  const at::Tensor out = plain_forward(inputs[0], inputs[1], inputs[2], call, kept);
  return torch::autograd::grad({out}, inputs, {grad});
}

at::Tensor cudnn_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionCall& call,
                         variable_list& kept) {
  const int64_t rows = static_cast<int64_t>(call.segments.lengths.size());
  const auto batch = [&](const at::Tensor& x) { return x.view({rows, -1, x.size(1), x.size(2)}).transpose(1, 2); };
  auto [out, lse, cu_q, cu_k, max_q, max_k, seed, offset, debug] = at::_scaled_dot_product_cudnn_attention(
      batch(q), batch(k), batch(v), std::nullopt, /*compute_log_sumexp=*/true, /*dropout_p=*/0, call.rule.causal,
      /*return_debug_mask=*/false, call.rule.scale);
  kept = {lse, seed, offset};
  return out.transpose(1, 2).contiguous().view(q.sizes());
}

variable_list cudnn_backward(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor& out, const AttentionCall& call, const variable_list& kept) {
  const int64_t rows = static_cast<int64_t>(call.segments.lengths.size());
  const auto batch = [&](const at::Tensor& x) { return x.view({rows, -1, x.size(1), x.size(2)}).transpose(1, 2); };
  auto [dq, dk, dv] = at::_scaled_dot_product_cudnn_attention_backward(
      batch(grad), batch(q), batch(k), batch(v), batch(out), kept[0], kept[1], kept[2], at::Tensor(), at::Tensor(),
      at::Tensor(), call.segments.max_length, call.segments.max_length, /*dropout_p=*/0, call.rule.causal,
      call.rule.scale);
  const auto flat = [](const at::Tensor& x, const at::Tensor& like) { return x.transpose(1, 2).reshape(like.sizes()); };
  return {flat(dq, q), flat(dk, k), flat(dv, v)};
}

/// FlashAttention counts the tokens before the own one; none means no limit.
std::optional<int64_t> window_left(const AttentionRule& rule) {
  return rule.window > 0 ? std::optional(rule.window - 1) : std::nullopt;
}

at::Tensor flash_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionCall& call,
                         variable_list& kept) {
  const Segments& s = call.segments;
  auto [out, lse, rng, unused, debug] = at::_flash_attention_forward(
      q, k, v, s.cu_seqlens, s.cu_seqlens, s.max_length, s.max_length, /*dropout_p=*/0, call.rule.causal,
      /*return_debug_mask=*/false, call.rule.scale, window_left(call.rule));
  kept = {lse, rng, unused};
  return out;
}

variable_list flash_backward(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor& out, const AttentionCall& call, const variable_list& kept) {
  const Segments& s = call.segments;
  auto [dq, dk, dv] = at::_flash_attention_backward(
      grad.contiguous(), q, k, v, out, kept[0], s.cu_seqlens, s.cu_seqlens, s.max_length, s.max_length, /*dropout_p=*/0,
      call.rule.causal, kept[1], kept[2], call.rule.scale, window_left(call.rule));
  return {dq, dk, dv};
}

const Kernel& kernel_for(const at::Tensor& q, const AttentionCall& call) {
  static constexpr Kernel cpu{cpu_forward, cpu_backward}, plain{plain_forward, plain_backward},
      cudnn{cudnn_forward, cudnn_backward}, flash{flash_forward, flash_backward};
  if (call.rule.dropout.active()) return plain;
  if (!q.is_cuda()) return cpu;
  if (q.scalar_type() != at::kBFloat16) return plain;
  // cuDNN's backward refuses some short or odd shapes; FlashAttention-2 takes every one.
  const Segments& s = call.segments;
  const bool rectangular = s.uniform() && s.max_length % 64 == 0 && q.size(2) % 64 == 0;
  return rectangular && !call.window_cuts(s.max_length) ? cudnn : flash;
}

struct AttentionNode : torch::autograd::Function<AttentionNode> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            c10::intrusive_ptr<AttentionCall> call) {
    variable_list kept;
    at::Tensor out = kernel_for(q, *call).forward(q, k, v, *call, kept);
    variable_list saved{q, k, v, out};
    saved.insert(saved.end(), kept.begin(), kept.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["call"] = c10::IValue::make_capsule(std::move(call));
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto call = c10::static_intrusive_pointer_cast<AttentionCall>(ctx->saved_data["call"].toCapsule());
    const variable_list s = ctx->get_saved_variables();
    const variable_list kept(s.begin() + 4, s.end());
    variable_list result =
        kernel_for(s[0], *call).backward(grads[0].view(s[3].sizes()), s[0], s[1], s[2], s[3], *call, kept);
    result.emplace_back();
    return result;
  }
};

}  // namespace

bool Segments::uniform() const {
  return std::all_of(lengths.begin(), lengths.end(), [&](int64_t length) { return length == max_length; });
}

at::Tensor attention(const at::Tensor& q_NHd, const at::Tensor& k_NKd, const at::Tensor& v_NKd,
                     const Segments& segments, const AttentionRule& rule) {
  TORCH_CHECK(q_NHd.size(1) % k_NKd.size(1) == 0, "attention: query heads must be a multiple of key-value heads");
  TORCH_CHECK(rule.causal || rule.window == 0, "attention: a window is of causal attention");
  auto call = c10::make_intrusive<AttentionCall>();
  call->segments = segments;
  call->rule = rule;
  return AttentionNode::apply(q_NHd, k_NKd, v_NKd, std::move(call)).view({q_NHd.size(0), -1});
}

at::Tensor cached_attention(const at::Tensor& q_NHd, const at::Tensor& k_TKd, const at::Tensor& v_TKd,
                            const AttentionRule& rule) {
  TORCH_CHECK(rule.causal, "attention: generation is causal");
  return plain_segment(q_NHd, k_TKd, v_TKd, rule).reshape({q_NHd.size(0), -1});
}

at::Tensor attention_reference(const at::Tensor& q_NHd, const at::Tensor& k_NKd, const at::Tensor& v_NKd,
                               const Segments& segments, const AttentionRule& rule) {
  AttentionCall call;
  call.segments = segments;
  call.rule = rule;
  variable_list kept;
  return plain_forward(q_NHd, k_NKd, v_NKd, call, kept).reshape({q_NHd.size(0), -1});
}

}  // namespace corank::ops
