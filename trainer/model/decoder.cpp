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
  Loader(const ModelOptions& options, std::shared_ptr<WeightSource> source, Communicator& tp)
      : options_(options), source_(std::move(source)), tp_(tp) {}

  std::unique_ptr<AdaptedLinear> linear(const std::string& name, int64_t in, int64_t out, Split split, bool has_bias) {
    LinearSite site{name, in, out, split, {}, {}};
    (split == Split::column ? site.out_shard : site.in_shard) = Shard::of(0, split == Split::column ? out : in, tp_);
    Shard shard = Shard::of(split == Split::column ? 0 : 1, split == Split::column ? out : in, tp_);
    BaseWeight base{{options_.quantization, options_.double_quant, options_.dtype, options_.device},
                    stored(name + ".weight", {out, in}),
                    shard};
    at::Tensor bias;
    if (has_bias) bias = place(source_->read(name + ".bias", {out}, site.out_shard));
    const bool adds_bias = split == Split::column || tp_.rank() == 0;
    return std::make_unique<AdaptedLinear>(std::move(site), std::move(base), bias, adds_bias);
  }

  ops::Weight norm(const std::string& name, int64_t size) { return {place(source_->read(name, {size}, {})), {}}; }
  ops::Weight vocabulary(const std::string& name, int64_t vocab, int64_t hidden) {
    return {place(source_->read(name, {vocab, hidden}, Shard::of(0, vocab, tp_))), {}};
  }
  void skip(const std::string& name) { source_->skip(name); }

 private:
  /// Reads as long as the linear lives.
  StoredWeight stored(const std::string& name, const std::vector<int64_t>& shape) const {
    return {name, [=, source = source_](const Shard& shard) { return source->read(name, shape, shard); },
            [=, source = source_] { return source->read_nf4(name, shape); }};
  }
  at::Tensor place(const at::Tensor& t) { return t.to(options_.device, options_.dtype).contiguous(); }

  const ModelOptions& options_;
  std::shared_ptr<WeightSource> source_;
  Communicator& tp_;
};

struct RopeTable {
  at::Tensor cos_Td, sin_Td;
};

class Attention {
 public:
  Attention(const DecoderConfig& c, int64_t layer, Loader& load)
      : layer_(layer), head_dim_(c.head_dim), scale_(1 / std::sqrt(static_cast<double>(c.head_dim))) {
    const std::string name = fmt::format("model.layers.{}.self_attn.", layer);
    const int64_t width = c.num_heads * c.head_dim, kv_width = c.num_kv_heads * c.head_dim;
    q_ = load.linear(name + "q_proj", c.hidden_size, width, Split::column, c.attention_bias);
    k_ = load.linear(name + "k_proj", c.hidden_size, kv_width, Split::column, c.attention_bias);
    v_ = load.linear(name + "v_proj", c.hidden_size, kv_width, Split::column, c.attention_bias);
    o_ = load.linear(name + "o_proj", width, c.hidden_size, Split::row, c.attention_bias);
  }

  at::Tensor forward(const at::Tensor& x_ND, const RopeTable& table, const ForwardContext& context) const {
    const auto qkv = column_forward({q_.get(), k_.get(), v_.get()}, x_ND, context);
    const auto heads = [&](const at::Tensor& x) { return x.view({x.size(0), -1, head_dim_}); };
    const auto [q_NHd, k_NKd] =
        ops::rope(heads(qkv[0]), heads(qkv[1]), table.cos_Td, table.sin_Td, context.batch.positions_N);
    return row_forward(*o_, context.attention.attend(layer_, q_NHd, k_NKd, heads(qkv[2]), scale_), context);
  }

  std::vector<AdaptedLinear*> linears() { return {q_.get(), k_.get(), v_.get(), o_.get()}; }

 private:
  int64_t layer_, head_dim_;
  double scale_;
  std::unique_ptr<AdaptedLinear> q_, k_, v_, o_;
};

class FeedForward {
 public:
  FeedForward(const DecoderConfig& c, int64_t layer, Loader& load) {
    const std::string name = fmt::format("model.layers.{}.mlp.", layer);
    gate_ = load.linear(name + "gate_proj", c.hidden_size, c.intermediate_size, Split::column, c.mlp_bias);
    up_ = load.linear(name + "up_proj", c.hidden_size, c.intermediate_size, Split::column, c.mlp_bias);
    down_ = load.linear(name + "down_proj", c.intermediate_size, c.hidden_size, Split::row, c.mlp_bias);
  }

  at::Tensor forward(const at::Tensor& x_ND, const ForwardContext& context) const {
    const auto gate_up = column_forward({gate_.get(), up_.get()}, x_ND, context);
    return row_forward(*down_, ops::swiglu(gate_up[0], gate_up[1]), context);
  }

  std::vector<AdaptedLinear*> linears() { return {gate_.get(), up_.get(), down_.get()}; }

 private:
  std::unique_ptr<AdaptedLinear> gate_, up_, down_;
};

/// The residual stream is handed on as (h, delta), so that its addition is part of the next norm.
struct Stream {
  at::Tensor h_ND, delta_ND;
};

class Layer {
 public:
  Layer(const DecoderConfig& c, int64_t layer, Checkpointing checkpointing, Loader& load)
      : eps_(c.rms_norm_eps),
        checkpointing_(checkpointing),
        input_norm_(load.norm(fmt::format("model.layers.{}.input_layernorm.weight", layer), c.hidden_size)),
        attention_(c, layer, load),
        post_norm_(load.norm(fmt::format("model.layers.{}.post_attention_layernorm.weight", layer), c.hidden_size)),
        feed_forward_(c, layer, load) {}

  Stream forward(const Stream& in, const RopeTable& table, const ForwardContext& context) const {
    const auto whole = [this, table, context](const variable_list& x) {
      const auto [h, x_ND] = ops::add_rms_norm(x[0], x[1], input_norm_, eps_);
      const auto [h2, y_ND] = ops::add_rms_norm(h, attention_.forward(x_ND, table, context), post_norm_, eps_);
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

  void collect(std::vector<AdaptedLinear*>& linears) {
    for (AdaptedLinear* linear : attention_.linears()) linears.push_back(linear);
    for (AdaptedLinear* linear : feed_forward_.linears()) linears.push_back(linear);
  }
  ops::Weight& input_norm() { return input_norm_; }
  ops::Weight& post_norm() { return post_norm_; }

 private:
  double eps_;
  Checkpointing checkpointing_;
  ops::Weight input_norm_;
  Attention attention_;
  ops::Weight post_norm_;
  FeedForward feed_forward_;
};

class Decoder : public Model {
 public:
  Decoder(const DecoderConfig& config, const ModelOptions& options, std::shared_ptr<WeightSource> source,
          Communicator& tp)
      : config_(config), tp_(tp), vocab_shard_(Shard::of(0, config.vocab_size, tp)) {
    Loader load(options, std::move(source), tp);
    embedding_ = load.vocabulary("model.embed_tokens.weight", config.vocab_size, config.hidden_size);
    for (int64_t i = 0; i < config.num_layers; ++i) {
      layers_.push_back(std::make_unique<Layer>(config, i, options.checkpointing, load));
    }
    final_norm_ = load.norm("model.norm.weight", config.hidden_size);
    if (config.tied_head) {
      load.skip("lm_head.weight");
    } else {
      head_ = load.vocabulary("lm_head.weight", config.vocab_size, config.hidden_size);
    }
    const auto table_dtype = options.dtype == at::kDouble ? at::kDouble : at::kFloat;
    std::tie(rope_.cos_Td, rope_.sin_Td) =
        rope_table(config.rope, config.head_dim, options.max_positions, table_dtype, options.device);
  }

  at::Tensor forward(const ForwardContext& context) const override {
    Stream stream{ops::embedding(context.batch.tokens_N, embedding_, vocab_shard_.start, tp_), {}};
    for (const auto& layer : layers_) stream = layer->forward(stream, rope_, context);
    return ops::add_rms_norm(stream.h_ND, stream.delta_ND, final_norm_, config_.rms_norm_eps).second;
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
    const std::vector<int64_t> vocabulary{config_.vocab_size, config_.hidden_size}, norm{config_.hidden_size};
    std::vector<NamedWeight> result{
        {"model.embed_tokens.weight", vocabulary, vocab_shard_, true, &embedding_, !config_.tied_head}};
    for (size_t i = 0; i < layers_.size(); ++i) {
      const std::string name = fmt::format("model.layers.{}.", i);
      result.push_back({name + "input_layernorm.weight", norm, {}, false, &layers_[i]->input_norm()});
      result.push_back({name + "post_attention_layernorm.weight", norm, {}, false, &layers_[i]->post_norm()});
    }
    result.push_back({"model.norm.weight", norm, {}, false, &final_norm_, true});
    if (!config_.tied_head) result.push_back({"lm_head.weight", vocabulary, vocab_shard_, true, &head_, true});
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
  ops::Weight embedding_;
  std::vector<std::unique_ptr<Layer>> layers_;
  ops::Weight final_norm_, head_;
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

std::unique_ptr<Model> make_decoder(const DecoderConfig& config, const ModelOptions& options,
                                    std::shared_ptr<WeightSource> weights, Communicator& tp) {
  return std::make_unique<Decoder>(config, options, std::move(weights), tp);
}

}  // namespace corank
