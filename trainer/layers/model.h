#pragma once
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "trainer/layers/adapted_linear.h"
#include "trainer/layers/cross_entropy.h"
#include "trainer/layers/forward_context.h"
#include "trainer/ops/attention.h"

namespace corank {

enum class WeightRole { embedding, positions, norm, head };

/// A base weight outside the blocks' linears.
struct NamedWeight {
  WeightRole role;             ///< a tied head is an embedding
  std::string name;            ///< Hugging Face's, with .weight
  std::vector<int64_t> shape;  ///< full
  Shard shard;
  bool decays = true;
  ops::Weight* weight = nullptr;  ///< owned by the model
  bool saveable = false;          ///< may stand in modules_to_save: untied, and outside the blocks
  GradientScope scope = GradientScope::data;
};

/// A body and a head. Owns its frozen weights and the adapters on them; no training state.
class Model {
 public:
  virtual ~Model() = default;
  /// Collective over tp. The last hidden state [N, D], after the final norm, of every token of the batch.
  virtual at::Tensor forward(const ForwardContext& context) const = 0;
  /// What its last hidden states are for.
  virtual std::unique_ptr<const TaskHead> task() const = 0;
  /// Of language models (generation).
  virtual VocabularyHead head() const = 0;
  /// The linears of the blocks, in a fixed order that is the same on all ranks.
  virtual std::vector<AdaptedLinear*> linears() = 0;
  /// Every other base weight, each once (a tied head stands under the embedding's name); the embedding first.
  virtual std::vector<NamedWeight> other_weights() = 0;
  /// Names of modules that take no adapter: those of every family, so that one meant for another model is seen.
  virtual std::vector<std::string> other_modules() const = 0;
  virtual int64_t num_layers() const = 0;
  virtual int64_t hidden_size() const = 0;
  virtual int64_t vocab_size() const = 0;
  /// Key-value heads on this rank and features of each (generation's cache).
  virtual int64_t local_kv_heads() const = 0;
  virtual int64_t head_dim() const = 0;
};

/// Makes `named` trainable, as parameter `name` that starts at its value.
void train_weight(const NamedWeight& named, const std::string& name, ParameterStore& store);

/// Names of model.linears(), in order.
std::vector<std::string> linear_names(Model& model);
/// What an adapter's targets choose from, and what they must not match.
struct ModuleNames {
  std::vector<std::string> linears, others;
};
ModuleNames module_names(Model& model);
/// Names of the weights that the family's files hold as [in, out]; everywhere else they are [out, in].
std::set<std::string> transposed_weights(Model& model);
/// All base parameters, full sizes.
int64_t num_base_parameters(Model& model);
/// Bytes of base weights on this rank's device.
int64_t base_bytes(Model& model);

/// Causal attention over the segments of one batch.
class SegmentAttention : public AttentionCore {
 public:
  explicit SegmentAttention(const Batch& batch);
  at::Tensor attend(int64_t layer, const at::Tensor& q_NHd, const at::Tensor& k_NKd, const at::Tensor& v_NKd,
                    const ops::AttentionRule& rule) override;

 private:
  ops::Segments segments_;
};

}  // namespace corank
