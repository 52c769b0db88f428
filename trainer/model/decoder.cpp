#include "trainer/model/decoder.h"

#include <fmt/format.h>

#include <cmath>

#include "configs/error.h"
#include "trainer/ops/embedding.h"
#include "trainer/ops/recompute.h"
#include "trainer/ops/rms_norm.h"
#include "trainer/ops/rope.h"
#include "trainer/ops/swiglu.h"

// Legend: N tokens, D hidden, H query heads of this rank, K key-value heads of this rank, d head_dim, F feed-forward.
namespace corank {
namespace {

using torch::autograd::variable_list;

/// Builds a model's parts from a weight source: this rank's shards, in the run's dtype, on its device.
class Loader {
 public:
  Loader(const ModelOptions& options, WeightSource& source, Communicator& tp)
      : options_(options), source_(source), tp_(tp) {}

  std::unique_ptr<AdaptedLinear> linear(const std::string& name, int64_t in, int64_t out, Split split, bool has_bias) {
    LinearSite site{name, in, out, split, {}, {}};
    (split == Split::column ? site.out_shard : site.in_shard) = Shard::of(0, split == Split::column ? out : in, tp_);
    Shard shard = Shard::of(split == Split::column ? 0 : 1, split == Split::column ? out : in, tp_);
    const auto read = [&](const Shard& s) { return source_.read(name + ".weight", {out, in}, s); };
    auto weight = make_frozen_weight({options_.quantization, options_.dtype, options_.device}, read, shard);
    at::Tensor bias;
    if (has_bias) bias = place(source_.read(name + ".bias", {out}, site.out_shard));
    const bool adds_bias = split == Split::column || tp_.rank() == 0;
    return std::make_unique<AdaptedLinear>(std::move(site), std::move(weight), bias, adds_bias);
  }

  ops::Weight vector(const std::string& name, int64_t size) { return {place(source_.read(name, {size}, {})), {}}; }
  ops::Weight vocabulary(const std::string& name, int64_t vocab, int64_t hidden) {
    return {place(source_.read(name, {vocab, hidden}, Shard::of(0, vocab, tp_))), {}};
  }
  void skip(const std::string& name) { source_.skip(name); }

 private:
  at::Tensor place(const at::Tensor& t) { return t.to(options_.device, options_.dtype).contiguous(); }

  const ModelOptions& options_;
  WeightSource& source_;
  Communicator& tp_;
};

struct RopeTable {
  at::Tensor cos_Td, sin_Td;
};

class Norm {
 public:
  Norm(std::string name, int64_t size, double eps, Loader& load)
      : name_(std::move(name)), eps_(eps), weight_D_(load.vector(name_ + ".weight", size)) {}

  /// (h, y) with h = residual + delta; an undefined delta stands for zero.
  std::pair<at::Tensor, at::Tensor> add(const at::Tensor& residual_ND, const at::Tensor& delta_ND) const {
    return ops::add_rms_norm(residual_ND, delta_ND, weight_D_, eps_);
  }
  at::Tensor operator()(const at::Tensor& x) const { return ops::rms_norm(x, weight_D_, eps_); }

  void collect(std::vector<NamedWeight>& weights, GradientScope scope = GradientScope::data) {
    weights.push_back({name_ + ".weight", weight_D_.value.sizes().vec(), {}, false, &weight_D_, scope});
  }

 private:
  std::string name_;
  double eps_;
  ops::Weight weight_D_;
};

/// Column-parallel linears that read one input.
class Projections {
 public:
  Projections(const std::string& layer, const std::vector<std::string>& names, int64_t in,
              const std::vector<int64_t>& outs, bool has_bias, Loader& load) {
    for (size_t i = 0; i < names.size(); ++i) {
      linears_.push_back(load.linear(layer + names[i], in, outs[i], Split::column, has_bias));
    }
  }

  std::vector<at::Tensor> forward(const at::Tensor& x_ND, const ForwardContext& context) const {
    std::vector<const AdaptedLinear*> all;
    for (const auto& linear : linears_) all.push_back(linear.get());
    return column_forward(all, x_ND, context);
  }

  void collect(std::vector<AdaptedLinear*>& linears) const {
    for (const auto& linear : linears_) linears.push_back(linear.get());
  }

 private:
  std::vector<std::unique_ptr<AdaptedLinear>> linears_;
};

class Attention {
 public:
  Attention(const DecoderConfig& c, int64_t index, const std::string& layer, Loader& load)
      : index_(index),
        head_dim_(c.head_dim),
        rule_{1 / std::sqrt(static_cast<double>(c.head_dim)), c.windows.empty() ? 0 : c.windows[index]},
        qkv_(layer, c.names.qkv, c.hidden_size,
             {c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.head_dim}, c.qkv_bias, load),
        out_(load.linear(layer + c.names.attention_out, c.num_heads * c.head_dim, c.hidden_size, Split::row,
                         c.attention_out_bias)) {
    if (!c.names.q_norm.empty()) q_norm_.emplace(layer + c.names.q_norm, c.head_dim, c.norm_eps, load);
    if (!c.names.k_norm.empty()) k_norm_.emplace(layer + c.names.k_norm, c.head_dim, c.norm_eps, load);
  }

  at::Tensor forward(const at::Tensor& x_ND, const RopeTable& table, const ForwardContext& context) const {
    const auto qkv = qkv_.forward(x_ND, context);
    const auto heads = [&](const at::Tensor& x) { return x.view({x.size(0), -1, head_dim_}); };
    const at::Tensor q = q_norm_ ? (*q_norm_)(heads(qkv[0])) : heads(qkv[0]);
    const at::Tensor k = k_norm_ ? (*k_norm_)(heads(qkv[1])) : heads(qkv[1]);
    const auto [q_NHd, k_NKd] = ops::rope(q, k, table.cos_Td, table.sin_Td, context.batch.positions_N);
    return row_forward(*out_, context.attention.attend(index_, q_NHd, k_NKd, heads(qkv[2]), rule_), context);
  }

  void collect(std::vector<AdaptedLinear*>& linears) const {
    qkv_.collect(linears);
    linears.push_back(out_.get());
  }
  /// Each tensor-parallel rank sees only its own heads, so its gradient of a norm that all heads share is a part.
  void collect(std::vector<NamedWeight>& weights) {
    if (q_norm_) q_norm_->collect(weights, GradientScope::everywhere);
    if (k_norm_) k_norm_->collect(weights, GradientScope::everywhere);
  }

 private:
  int64_t index_, head_dim_;
  ops::AttentionRule rule_;
  Projections qkv_;
  std::optional<Norm> q_norm_, k_norm_;
  std::unique_ptr<AdaptedLinear> out_;
};

class FeedForward {
 public:
  FeedForward(const DecoderConfig& c, const std::string& layer, Loader& load)
      : in_(layer, c.names.feed_forward_in, c.hidden_size, {c.intermediate_size, c.intermediate_size}, c.mlp_bias,
            load),
        out_(load.linear(layer + c.names.feed_forward_out, c.intermediate_size, c.hidden_size, Split::row,
                         c.mlp_bias)) {}

  at::Tensor forward(const at::Tensor& x_ND, const ForwardContext& context) const {
    const auto gate_up = in_.forward(x_ND, context);
    return row_forward(*out_, ops::swiglu(gate_up[0], gate_up[1]), context);
  }

  void collect(std::vector<AdaptedLinear*>& linears) const {
    in_.collect(linears);
    linears.push_back(out_.get());
  }

 private:
  Projections in_;
  std::unique_ptr<AdaptedLinear> out_;
};

/// The residual stream is handed on as (h, delta), so that its addition is part of the next norm.
struct Stream {
  at::Tensor h_ND, delta_ND;
};

class Layer {
 public:
  Layer(const DecoderConfig& c, int64_t index, Checkpointing checkpointing, Loader& load)
      : Layer(c, index, fmt::format("{}.{}.", c.names.layers, index), checkpointing, load) {}

  Stream forward(const Stream& in, const RopeTable& table, const ForwardContext& context) const {
    const auto whole = [this, table, context](const variable_list& x) {
      const auto [h, x_ND] = attention_norm_.add(x[0], x[1]);
      const auto [h2, y_ND] = feed_forward_norm_.add(h, attention_.forward(x_ND, table, context));
      const auto mlp = [this, context](const variable_list& y) {
        return variable_list{feed_forward_.forward(y[0], context)};
      };
      const variable_list out = checkpointing_ == Checkpointing::mlp ? ops::recompute(mlp, {y_ND}) : mlp({y_ND});
      return variable_list{h2, out[0]};
    };
    const variable_list input{in.h_ND, in.delta_ND};
    const variable_list out = checkpointing_ == Checkpointing::full ? ops::recompute(whole, input) : whole(input);
    return {out[0], out[1]};
  }

  void collect(std::vector<AdaptedLinear*>& linears) const {
    attention_.collect(linears);
    feed_forward_.collect(linears);
  }
  void collect(std::vector<NamedWeight>& weights) {
    attention_norm_.collect(weights);
    attention_.collect(weights);
    feed_forward_norm_.collect(weights);
  }

 private:
  Layer(const DecoderConfig& c, int64_t index, const std::string& name, Checkpointing checkpointing, Loader& load)
      : checkpointing_(checkpointing),
        attention_norm_(name + c.names.attention_norm, c.hidden_size, c.norm_eps, load),
        attention_(c, index, name, load),
        feed_forward_norm_(name + c.names.feed_forward_norm, c.hidden_size, c.norm_eps, load),
        feed_forward_(c, name, load) {}

  Checkpointing checkpointing_;
  Norm attention_norm_;
  Attention attention_;
  Norm feed_forward_norm_;
  FeedForward feed_forward_;
};

class Decoder : public Model {
 public:
  Decoder(const DecoderConfig& config, const ModelOptions& options, Loader load, Communicator& tp)
      : config_(config),
        tp_(tp),
        vocab_shard_(Shard::of(0, config.vocab_size, tp)),
        embedding_(load.vocabulary(config.names.embedding + ".weight", config.vocab_size, config.hidden_size)),
        final_norm_(config.names.final_norm, config.hidden_size, config.norm_eps, load) {
    for (int64_t i = 0; i < config.num_layers; ++i) {
      layers_.push_back(std::make_unique<Layer>(config, i, options.checkpointing, load));
    }
    const std::string head = config.names.head + ".weight";
    if (config.tied_head) {
      load.skip(head);
    } else {
      head_ = load.vocabulary(head, config.vocab_size, config.hidden_size);
    }
    const auto table_dtype = options.dtype == at::kDouble ? at::kDouble : at::kFloat;
    std::tie(rope_.cos_Td, rope_.sin_Td) =
        rope_table(config.rope, config.head_dim, options.max_positions, table_dtype, options.device);
  }

  at::Tensor forward(const ForwardContext& context) const override {
    Stream stream{ops::embedding(context.batch.tokens_N, embedding_, vocab_shard_.start, tp_), {}};
    for (const auto& layer : layers_) stream = layer->forward(stream, rope_, context);
    return final_norm_.add(stream.h_ND, stream.delta_ND).second;
  }

  ops::VocabularyHead head() const override {
    return {config_.tied_head ? embedding_ : head_, vocab_shard_.start, config_.vocab_size};
  }

  std::vector<AdaptedLinear*> linears() override {
    std::vector<AdaptedLinear*> result;
    for (const auto& layer : layers_) layer->collect(result);
    return result;
  }

  std::vector<NamedWeight> other_weights() override {
    const std::vector<int64_t> vocabulary{config_.vocab_size, config_.hidden_size};
    const DecoderNames& names = config_.names;
    std::vector<NamedWeight> result{{names.embedding + ".weight", vocabulary, vocab_shard_, true, &embedding_}};
    for (const auto& layer : layers_) layer->collect(result);
    final_norm_.collect(result);
    if (!config_.tied_head) result.push_back({names.head + ".weight", vocabulary, vocab_shard_, true, &head_});
    return result;
  }

  int64_t num_layers() const override { return config_.num_layers; }
  int64_t hidden_size() const override { return config_.hidden_size; }
  int64_t vocab_size() const override { return config_.vocab_size; }
  int64_t local_kv_heads() const override { return config_.num_kv_heads / tp_.size(); }
  int64_t head_dim() const override { return config_.head_dim; }

 private:
  DecoderConfig config_;
  Communicator& tp_;
  Shard vocab_shard_;
  ops::Weight embedding_, head_;
  std::vector<std::unique_ptr<Layer>> layers_;
  Norm final_norm_;
  RopeTable rope_;
};

void require_divides(const char* what, int64_t size, int tensor) {
  if (size % tensor == 0) return;
  throw ConfigError(fmt::format(
      "parallel.tensor: {} ranks do not divide the model's {} {}. Choose a tensor-parallel size that divides it.",
      tensor, size, what));
}

}  // namespace

void check_split(const DecoderConfig& config, int tensor) {
  require_divides("attention heads (num_attention_heads)", config.num_heads, tensor);
  require_divides("key-value heads (num_key_value_heads)", config.num_kv_heads, tensor);
  require_divides("feed-forward features (intermediate_size)", config.intermediate_size, tensor);
}

std::unique_ptr<Model> make_decoder(const DecoderConfig& config, const ModelOptions& options, WeightSource& weights,
                                    Communicator& tp) {
  return std::make_unique<Decoder>(config, options, Loader(options, weights, tp), tp);
}

}  // namespace corank
