#include "trainer/models/decoder.h"

#include <fmt/format.h>

#include <cmath>
#include <numeric>

#include "configs/error.h"
#include "trainer/layers/embedding.h"
#include "trainer/ops/layer_norm.h"
#include "trainer/ops/recompute.h"
#include "trainer/ops/rms_norm.h"
#include "trainer/ops/rope.h"
#include "trainer/ops/swiglu.h"

// Legend: N tokens, D hidden, H query heads of this rank, K key-value heads of this rank, d head_dim, F feed-forward.
namespace corank {
namespace {

using torch::autograd::variable_list;

/// Builds a model's parts from a weight source: this rank's shards, in the run's dtype, on its device.
class PartLoader {
 public:
  PartLoader(const DecoderConfig& config, const ModelOptions& options, std::shared_ptr<WeightSource> source,
             Communicator& tp)
      : fan_in_fan_out_(config.fan_in_fan_out), options_(options), source_(std::move(source)), tp_(tp) {}

  /// Linears of one input, each of the size that `outs` gives it, in one matrix where format and residency have such.
  std::vector<std::unique_ptr<AdaptedLinear>> columns(LinearRole role, const std::string& layer,
                                                      const std::vector<std::string>& names, int64_t in,
                                                      const std::vector<int64_t>& outs, bool has_bias) {
    std::vector<int64_t> rows;
    for (const int64_t out : outs) rows.push_back(Shard::of(0, out, tp_).local_shape({out})[0]);
    const auto rooms = shared_rooms(format(), rows, in, *options_.residency);
    WeightPlace place = next_place();
    std::vector<std::unique_ptr<AdaptedLinear>> linears;
    for (size_t i = 0; i < names.size(); ++i) {
      place.room_OI = rooms[i];
      linears.push_back(column(role, layer + names[i], in, {outs[i]}, has_bias, place));
    }
    return linears;
  }

  /// The linear's rows are sections of sizes `outs`, each split for itself.
  std::unique_ptr<AdaptedLinear> column(LinearRole role, const std::string& name, int64_t in,
                                        const std::vector<int64_t>& outs, bool has_bias, const WeightPlace& place) {
    const Shard shard = Shard::of(0, outs, tp_);
    if (!shard.sections.empty() && options_.quantization != "none") {
      throw ConfigError(
          fmt::format("model.quantization: {} cannot be quantised and split, because it holds several matrices. Set "
                      "parallel.tensor to 1.",
                      name));
    }
    const int64_t out = std::accumulate(outs.begin(), outs.end(), int64_t{0});
    return linear({name, in, out, Split::column, {}, shard, fan_in_fan_out_, role}, shard, has_bias,
                  /*adds_bias=*/true, place);
  }

  std::unique_ptr<AdaptedLinear> row(LinearRole role, const std::string& name, int64_t in, int64_t out, bool has_bias) {
    return linear({name, in, out, Split::row, Shard::of(0, in, tp_), {}, fan_in_fan_out_, role}, Shard::of(1, in, tp_),
                  has_bias, /*adds_bias=*/tp_.rank() == 0, next_place());
  }

  WeightPlace next_place() { return {options_.residency, order_++, {}}; }

  ops::Weight vector(const std::string& name, int64_t size) { return {place(source_->read(name, {size}, {})), {}}; }
  ops::Weight vocabulary(const std::string& name, int64_t vocab, int64_t hidden) {
    return {place(source_->read(name, {vocab, hidden}, Shard::of(0, vocab, tp_))), {}};
  }
  ops::Weight table(const std::string& name, int64_t rows, int64_t width) {
    return {place(source_->read(name, {rows, width}, {})), {}};
  }
  void skip(const std::string& name) { source_->skip(name); }

 private:
  FormatOptions format() const {
    return {options_.quantization, options_.double_quant, options_.dtype, options_.device};
  }

  std::unique_ptr<AdaptedLinear> linear(LinearSite site, const Shard& shard, bool has_bias, bool adds_bias,
                                        const WeightPlace& where) {
    BaseWeight base{format(), stored(site), shard, where};
    at::Tensor bias;
    if (has_bias) bias = place(read_sections(*source_, site.name + ".bias", {site.out}, site.out_shard));
    return std::make_unique<AdaptedLinear>(std::move(site), std::move(base), bias, adds_bias);
  }

  /// Reads as long as the linear lives.
  StoredWeight stored(const LinearSite& site) const {
    const std::string name = site.name + ".weight";
    const std::vector<int64_t> shape{site.out, site.in};
    const bool transposed = site.fan_in_fan_out;
    return {name,
            [=, source = source_](const Shard& shard) { return read_matrix(*source, name, shape, transposed, shard); },
            [=, source = source_] { return source->read_nf4(name, shape); }};
  }

  /// The block of W [O, I] that `shard` names; `transposed`: the file holds it as [I, O].
  static at::Tensor read_matrix(WeightSource& source, const std::string& name, const std::vector<int64_t>& shape,
                                bool transposed, Shard shard) {
    if (!transposed) return read_sections(source, name, shape, shard);
    if (!shard.whole()) shard.dim = 1 - shard.dim;
    return read_sections(source, name, {shape[1], shape[0]}, shard).t().contiguous();
  }

  /// A block of several sections is not one range of the file: taken from the whole.
  static at::Tensor read_sections(WeightSource& source, const std::string& name, const std::vector<int64_t>& shape,
                                  const Shard& shard) {
    if (shard.sections.empty()) return source.read(name, shape, shard);
    return take_shard(source.read(name, shape, {}), shard);
  }

  at::Tensor place(const at::Tensor& t) { return t.to(options_.device, options_.dtype).contiguous(); }

  bool fan_in_fan_out_;
  const ModelOptions& options_;
  std::shared_ptr<WeightSource> source_;
  Communicator& tp_;
  int64_t order_ = 0;  ///< of the next weights that read one input
};

/// Rotary positions; without a table q and k stay as they are.
struct RopeTable {
  at::Tensor cos_Td, sin_Td;

  std::pair<at::Tensor, at::Tensor> turn(const at::Tensor& q_NHd, const at::Tensor& k_NKd,
                                         const at::Tensor& positions_N) const {
    if (!cos_Td.defined()) return {q_NHd, k_NKd};
    return ops::rope(q_NHd, k_NKd, cos_Td, sin_Td, positions_N);
  }
};

/// Dropout of the base model, drawn in training only; `place` names it among all dropouts.
ops::Dropout base_dropout(double p, const std::string& place, const ForwardContext& context) {
  if (!context.dropout || p == 0) return {};
  return {p, context.dropout->key("base dropout", place), context.batch.slots_N, 0};
}

/// RMSNorm or LayerNorm of the residual stream.
class Norm {
 public:
  Norm(std::string name, const DecoderConfig& c, PartLoader& load)
      : name_(std::move(name)), eps_(c.norm_eps), weight_D_(load.vector(name_ + ".weight", c.hidden_size)) {
    if (c.layer_norm) bias_D_ = load.vector(name_ + ".bias", c.hidden_size);
  }

  /// (h, y) with h = residual + delta; an undefined delta stands for zero.
  std::pair<at::Tensor, at::Tensor> add(const at::Tensor& residual_ND, const at::Tensor& delta_ND) const {
    return bias_D_.defined() ? ops::add_layer_norm(residual_ND, delta_ND, weight_D_, bias_D_, eps_)
                             : ops::add_rms_norm(residual_ND, delta_ND, weight_D_, eps_);
  }

  void collect(std::vector<NamedWeight>& weights, bool saveable = false) {
    weights.push_back(
        {WeightRole::norm, name_ + ".weight", weight_D_.value.sizes().vec(), {}, false, &weight_D_, saveable});
    if (!bias_D_.defined()) return;
    weights.push_back({WeightRole::norm, name_ + ".bias", bias_D_.value.sizes().vec(), {}, false, &bias_D_, saveable});
  }

 private:
  std::string name_;
  double eps_;
  ops::Weight weight_D_, bias_D_;
};

/// RMSNorm of every head, with one weight for all; none where the family has no name for it.
class HeadNorm {
 public:
  HeadNorm(const std::string& layer, const std::string& name, const DecoderConfig& c, PartLoader& load)
      : name_(layer + name + ".weight"), eps_(c.norm_eps) {
    if (!name.empty()) weight_d_ = load.vector(name_, c.head_dim);
  }

  at::Tensor operator()(const at::Tensor& x_NHd) const {
    return weight_d_.defined() ? ops::rms_norm(x_NHd, weight_d_, eps_) : x_NHd;
  }

  /// A tensor-parallel rank sees only its own heads, so its gradient is a part.
  void collect(std::vector<NamedWeight>& weights) {
    if (!weight_d_.defined()) return;
    weights.push_back({WeightRole::norm,
                       name_,
                       weight_d_.value.sizes().vec(),
                       {},
                       false,
                       &weight_d_,
                       false,
                       GradientScope::everywhere});
  }

 private:
  std::string name_;
  double eps_;
  ops::Weight weight_d_;
};

/// Column-parallel projections of one input, to features of sizes `outs`: a linear each, or one linear of them all.
class Projections {
 public:
  Projections(LinearRole role, const std::string& layer, const std::vector<std::string>& names, int64_t in,
              const std::vector<int64_t>& outs, bool has_bias, PartLoader& load) {
    if (names.size() == outs.size()) {
      linears_ = load.columns(role, layer, names, in, outs, has_bias);
    } else {
      linears_.push_back(load.column(role, layer + names[0], in, outs, has_bias, load.next_place()));
    }
    outs_ = outs;
  }

  std::vector<at::Tensor> forward(const at::Tensor& x_ND, const ForwardContext& context) const {
    std::vector<const AdaptedLinear*> all;
    for (const auto& linear : linears_) all.push_back(linear.get());
    std::vector<at::Tensor> outputs = column_forward(all, x_ND, context);
    if (outputs.size() == outs_.size()) return outputs;
    std::vector<int64_t> local;
    for (const int64_t out : outs_) local.push_back(out / context.tp.size());
    outputs = outputs[0].split_with_sizes(local, 1);
    for (at::Tensor& part : outputs) part = part.contiguous();
    return outputs;
  }

  void collect(std::vector<AdaptedLinear*>& linears) const {
    for (const auto& linear : linears_) linears.push_back(linear.get());
  }

 private:
  std::vector<std::unique_ptr<AdaptedLinear>> linears_;
  std::vector<int64_t> outs_;
};

class SelfAttention {
 public:
  SelfAttention(const DecoderConfig& c, int64_t index, const std::string& layer, PartLoader& load)
      : index_(index),
        head_dim_(c.head_dim),
        name_(layer + "attention"),
        rule_{
            1 / std::sqrt(static_cast<double>(c.head_dim)), c.windows.empty() ? 0 : c.windows[index], {}, 0, c.causal},
        dropout_(c.attention_dropout),
        residual_dropout_(c.residual_dropout),
        qkv_(LinearRole::attention_in, layer, c.names.qkv, c.hidden_size,
             {c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.head_dim}, c.qkv_bias, load),
        q_norm_(layer, c.names.q_norm, c, load),
        k_norm_(layer, c.names.k_norm, c, load),
        out_(load.row(LinearRole::attention_out, layer + c.names.attention_out, c.num_heads * c.head_dim, c.hidden_size,
                      c.attention_out_bias)) {}

  at::Tensor forward(const at::Tensor& x_ND, const RopeTable& table, const ForwardContext& context) const {
    const auto qkv = qkv_.forward(x_ND, context);
    const auto heads = [&](const at::Tensor& x) { return x.view({x.size(0), -1, head_dim_}); };
    const auto [q_NHd, k_NKd] = table.turn(q_norm_(heads(qkv[0])), k_norm_(heads(qkv[1])), context.batch.positions_N);
    ops::AttentionRule rule = rule_;
    rule.dropout = base_dropout(dropout_, name_, context);
    rule.first_head = context.tp.rank() * q_NHd.size(1);
    const at::Tensor mixed_NO = context.attention.attend(index_, q_NHd, k_NKd, heads(qkv[2]), rule);
    return ops::dropout_node(row_forward(*out_, mixed_NO, context),
                             base_dropout(residual_dropout_, name_ + " out", context));
  }

  void collect(std::vector<AdaptedLinear*>& linears) const {
    qkv_.collect(linears);
    linears.push_back(out_.get());
  }
  void collect(std::vector<NamedWeight>& weights) {
    q_norm_.collect(weights);
    k_norm_.collect(weights);
  }

 private:
  int64_t index_, head_dim_;
  std::string name_;
  ops::AttentionRule rule_;
  double dropout_, residual_dropout_;
  Projections qkv_;
  HeadNorm q_norm_, k_norm_;
  std::unique_ptr<AdaptedLinear> out_;
};

class FeedForward {
 public:
  FeedForward(const DecoderConfig& c, const std::string& layer, PartLoader& load)
      : name_(layer + "feed_forward"),
        activation_(c.activation),
        residual_dropout_(c.residual_dropout),
        in_(LinearRole::feed_forward_in, layer, c.names.feed_forward_in, c.hidden_size,
            std::vector<int64_t>(c.activation == Activation::swiglu ? 2 : 1, c.intermediate_size), c.mlp_bias, load),
        out_(load.row(LinearRole::feed_forward_out, layer + c.names.feed_forward_out, c.intermediate_size,
                      c.hidden_size, c.mlp_bias)) {}

  at::Tensor forward(const at::Tensor& x_ND, const ForwardContext& context) const {
    const auto in = in_.forward(x_ND, context);
    const at::Tensor f_NF = activation_ == Activation::swiglu ? ops::swiglu(in[0], in[1]) : at::gelu(in[0], "tanh");
    return ops::dropout_node(row_forward(*out_, f_NF, context),
                             base_dropout(residual_dropout_, name_ + " out", context));
  }

  void collect(std::vector<AdaptedLinear*>& linears) const {
    in_.collect(linears);
    linears.push_back(out_.get());
  }

 private:
  std::string name_;
  Activation activation_;
  double residual_dropout_;
  Projections in_;
  std::unique_ptr<AdaptedLinear> out_;
};

/// The residual stream is handed on as (h, delta), so that its addition is part of the next norm.
struct Stream {
  at::Tensor h_ND, delta_ND;
};

class Layer {
 public:
  Layer(const DecoderConfig& c, int64_t index, Checkpointing checkpointing, PartLoader& load)
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
  Layer(const DecoderConfig& c, int64_t index, const std::string& name, Checkpointing checkpointing, PartLoader& load)
      : checkpointing_(checkpointing),
        attention_norm_(name + c.names.attention_norm, c, load),
        attention_(c, index, name, load),
        feed_forward_norm_(name + c.names.feed_forward_norm, c, load),
        feed_forward_(c, name, load) {
    for (const std::string& buffer : c.names.buffers) load.skip(name + buffer);
  }

  Checkpointing checkpointing_;
  Norm attention_norm_;
  SelfAttention attention_;
  Norm feed_forward_norm_;
  FeedForward feed_forward_;
};

class Decoder : public Model {
 public:
  Decoder(const DecoderConfig& config, const ModelOptions& options, PartLoader load, Communicator& tp)
      : config_(config),
        tp_(tp),
        residency_(options.residency),
        vocab_shard_(Shard::of(0, config.vocab_size, tp)),
        embedding_(load.vocabulary(config.names.embedding + ".weight", config.vocab_size, config.hidden_size)),
        final_norm_(config.names.final_norm, config, load) {
    for (int64_t i = 0; i < config.num_layers; ++i) {
      layers_.push_back(std::make_unique<Layer>(config, i, options.checkpointing, load));
    }
    const std::string head = config.names.head + ".weight";
    if (config.tied_head) {
      load.skip(head);
    } else {
      head_ = load.vocabulary(head, config.vocab_size, config.hidden_size);
    }
    if (!config.names.positions.empty()) {
      positions_ = load.table(config.names.positions + ".weight", config.num_positions, config.hidden_size);
      return;
    }
    const auto table_dtype = options.dtype == at::kDouble ? at::kDouble : at::kFloat;
    std::tie(rope_.cos_Td, rope_.sin_Td) =
        rope_table(config.rope, config.head_dim, options.max_positions, table_dtype, options.device);
  }

  at::Tensor forward(const ForwardContext& context) const override {
    residency_->begin_forward();
    at::Tensor x_ND = embedding(context.batch.tokens_N, embedding_, vocab_shard_.start, tp_);
    if (positions_.defined()) x_ND = x_ND + lookup(context.batch.positions_N, positions_);
    Stream stream{ops::dropout_node(x_ND, base_dropout(config_.embedding_dropout, "embedding", context)), {}};
    for (const auto& layer : layers_) stream = layer->forward(stream, rope_, context);
    return final_norm_.add(stream.h_ND, stream.delta_ND).second;
  }

  std::unique_ptr<const TaskHead> task() const override { return std::make_unique<NextToken>(head()); }
  VocabularyHead head() const override {
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
    std::vector<NamedWeight> result{{WeightRole::embedding, names.embedding + ".weight", vocabulary, vocab_shard_, true,
                                     &embedding_, !config_.tied_head}};
    if (positions_.defined()) {
      result.push_back(
          {WeightRole::positions, names.positions + ".weight", positions_.value.sizes().vec(), {}, true, &positions_});
    }
    for (const auto& layer : layers_) layer->collect(result);
    final_norm_.collect(result, /*saveable=*/true);
    if (!config_.tied_head)
      result.push_back({WeightRole::head, names.head + ".weight", vocabulary, vocab_shard_, true, &head_, true});
    return result;
  }

  std::vector<std::string> other_modules() const override { return family_modules().others; }

  int64_t num_layers() const override { return config_.num_layers; }
  int64_t hidden_size() const override { return config_.hidden_size; }
  int64_t vocab_size() const override { return config_.vocab_size; }
  int64_t local_kv_heads() const override { return config_.num_kv_heads / tp_.size(); }
  int64_t head_dim() const override { return config_.head_dim; }

 private:
  DecoderConfig config_;
  Communicator& tp_;
  std::shared_ptr<Residency> residency_;
  Shard vocab_shard_;
  ops::Weight embedding_, positions_, head_;
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

class DecoderBlueprint : public Blueprint {
 public:
  explicit DecoderBlueprint(DecoderConfig config) : config_(std::move(config)) {}

  void check_split(int tensor) const override {
    require_divides("attention heads (num_attention_heads)", config_.num_heads, tensor);
    require_divides("key-value heads (num_key_value_heads)", config_.num_kv_heads, tensor);
    require_divides("feed-forward features (intermediate_size)", config_.intermediate_size, tensor);
  }

  void check_positions(const std::string& origin, int64_t positions) const override {
    if (const int64_t most = config_.rope.most_positions; most > 0 && positions > most) {
      throw InputError(fmt::format(
          "{}: its rope_scaling (rope_parameters) of type dynamic is followed up to max_position_embeddings, "
          "{}: beyond it the frequencies depend on the longest sequence of a batch. data.seq_len (in "
          "generation: prompt and new tokens together) asks for {}. Ask for {} at most.",
          origin, most, positions, most));
    }
    if (config_.num_positions == 0 || positions <= config_.num_positions) return;
    throw ConfigError(
        fmt::format("data.seq_len (in generation: prompt and new tokens together): {} tokens are more than the {} "
                    "positions that the model has learned. Ask for {} at most.",
                    positions, config_.num_positions, config_.num_positions));
  }

  std::string embedding() const override { return config_.names.embedding + ".weight"; }

  /// Files that hold another head are believed more than tie_word_embeddings, as in transformers.
  std::unique_ptr<Model> build(const ModelOptions& options, std::shared_ptr<WeightSource> weights,
                               Communicator& tp) const override {
    DecoderConfig config = config_;
    if (weights->differ(embedding(), config.names.head + ".weight")) config.tied_head = false;
    return std::make_unique<Decoder>(config, options, PartLoader(config, options, std::move(weights), tp), tp);
  }

 private:
  DecoderConfig config_;
};

std::string last_part(const std::string& name) { return name.substr(name.rfind('.') + 1); }

}  // namespace

std::unique_ptr<Blueprint> decoder_blueprint(DecoderConfig config) {
  return std::make_unique<DecoderBlueprint>(std::move(config));
}

FamilyModules decoder_modules(const DecoderNames& names) {
  FamilyModules modules{{last_part(names.embedding)}, {last_part(names.head)}, {}};
  for (const std::string& name : {names.head, names.embedding, names.positions, names.final_norm}) {
    if (!name.empty()) modules.others.push_back(name);
  }
  for (const std::string& name : {names.attention_norm, names.feed_forward_norm, names.q_norm, names.k_norm}) {
    if (!name.empty()) modules.others.push_back(names.layers + ".0." + name);
  }
  return modules;
}

}  // namespace corank
