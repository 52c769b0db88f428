#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <tuple>

#include "trainer/methods/attach.h"
#include "trainer/methods/config_keys.h"
#include "trainer/methods/dora_update.h"
#include "trainer/methods/lora_factors.h"
#include "trainer/methods/methods.h"

// DoRA (arXiv 2402.09353; methods 4): LoRA's factors and a magnitude for each output feature. The row norms are
// constants of a step: they are computed once after each change of the parameters, for row-parallel linears from all
// ranks' parts in one sum (methods 10.3). Unlike PEFT, the first magnitudes are not rounded to bfloat16: m / n starts
// at 1 exactly.
namespace corank {
namespace {

constexpr const char* kMagnitude = ".lora_magnitude_vector";

class DoraAdapter : public Adapter {
 public:
  DoraAdapter(const AdaptedLinear& linear, double dropout) : linear_(linear), dropout_(dropout) {}

  std::shared_ptr<const Update> update(const ops::Dropout& dropout) const override {
    return std::make_shared<DoraUpdate>(factors_.low_rank(dropout), scale_);
  }
  double dropout() const override { return dropout_; }
  bool row() const { return linear_.site().row(); }

  void add_to(ParameterStore& store, const LoraFactors::Options& options) {
    const LinearSite& site = linear_.site();
    factors_.add_to(store, site, options);
    ParameterSpec magnitude;
    magnitude.name = peft_name(site.name, kMagnitude);
    magnitude.shape = {site.out};
    magnitude.shard = site.out_shard;
    magnitude.scope = row() ? GradientScope::everywhere : GradientScope::data;  // row: from this rank's part of q
    magnitude.bind = [this](const ops::Weight& w) { scale_.magnitude_leaf_O = w.leaf; };
    store.add(std::move(magnitude));
    scale_.overwritten = row() && !site.in_shard.whole();
  }

  const FrozenWeight& weight() const { return linear_.weight(); }
  LowRank factors() const { return factors_.low_rank(); }
  at::Tensor magnitude_O() const { return scale_.magnitude_leaf_O.detach(); }
  void set_scale(const at::Tensor& gamma_O, const at::Tensor& inverse_norm_O, const at::Tensor& inverse_magnitude_O) {
    scale_.gamma_O = gamma_O;
    scale_.inverse_norm_O = inverse_norm_O;
    scale_.inverse_magnitude_O = inverse_magnitude_O;
  }
  void start_at_norm() { magnitude_O().copy_(scale_.inverse_norm_O.reciprocal()); }

 private:
  const AdaptedLinear& linear_;
  double dropout_;
  LoraFactors factors_;
  MagnitudeScale scale_;
};

/// Adapters of one shape, rank and scale: their norms are a few large products instead of many small ones.
class NormGroup {
 public:
  explicit NormGroup(const std::vector<DoraAdapter*>& adapters) : adapters_(adapters) {
    std::vector<at::Tensor> squares;
    for (const DoraAdapter* adapter : adapters_) {
      squares.push_back(squared_row_norms(adapter->weight().dense_OI(), adapter->magnitude_O().scalar_type()));
    }
    base_squares_MO_ = at::stack(squares);
  }

  bool row() const { return adapters_.front()->row(); }
  int64_t size() const { return static_cast<int64_t>(adapters_.size()); }

  /// This rank's part of the squared norms [M, O].
  at::Tensor local_squares() const {
    std::vector<const Matrix*> weights;
    std::vector<LowRank> factors;
    for (const DoraAdapter* adapter : adapters_) {
      weights.push_back(&adapter->weight());
      factors.push_back(adapter->factors());
    }
    return squared_row_norms(base_squares_MO_, weights, factors);
  }

  void set_squares(const at::Tensor& squares_MO) const {
    std::vector<at::Tensor> magnitudes;
    for (const DoraAdapter* adapter : adapters_) magnitudes.push_back(adapter->magnitude_O());
    const at::Tensor inverse_MO = squares_MO.clamp_min(std::numeric_limits<float>::min()).rsqrt_();
    at::Tensor gamma_MO = at::stack(magnitudes).mul_(inverse_MO);
    gamma_MO.masked_fill_(gamma_MO == 0, kSmallestGamma);
    const at::Tensor inverse_magnitude_MO = inverse_MO / gamma_MO;
    for (size_t i = 0; i < adapters_.size(); ++i) {
      const auto m = static_cast<int64_t>(i);
      adapters_[i]->set_scale(gamma_MO[m], inverse_MO[m], inverse_magnitude_MO[m]);
    }
  }

 private:
  static constexpr double kSmallestGamma = 1e-20;  // y is as good as 0, and y / gamma still is q in bfloat16

  std::vector<DoraAdapter*> adapters_;
  at::Tensor base_squares_MO_;
};

std::vector<NormGroup> grouped(const std::vector<DoraAdapter*>& adapters) {
  std::map<std::tuple<bool, std::vector<int64_t>, std::vector<int64_t>, double>, std::vector<DoraAdapter*>> by_shape;
  for (DoraAdapter* adapter : adapters) {
    const LowRank f = adapter->factors();
    by_shape[{adapter->row(), f.a_RI.value.sizes().vec(), f.b_OR.value.sizes().vec(), f.scale}].push_back(adapter);
  }
  std::vector<NormGroup> groups;
  for (const auto& [shape, members] : by_shape) groups.emplace_back(members);
  return groups;
}

class Dora : public AdapterMethod {
 public:
  using AdapterMethod::AdapterMethod;

  void attach(Model& model, ParameterStore& store, uint64_t seed) override {
    attach_adapters(model, config_, [&](const AdaptedLinear& linear) {
      auto adapter = std::make_unique<DoraAdapter>(linear, config_.lora_dropout);
      adapter->add_to(store, lora_options(config_, linear.site(), seed));
      adapters_.push_back(adapter.get());
      return adapter;
    });
  }
  void initialise(const Mesh& mesh) override {
    refresh(mesh.tp());
    for (DoraAdapter* adapter : adapters_) adapter->start_at_norm();
  }
  void begin(const Mesh& mesh) override { refresh(mesh.tp()); }
  bool on_step_end(int64_t, const Mesh& mesh) override {
    refresh(mesh.tp());
    return false;
  }

  GradientSizes gradient_sizes(const LinearSize& linear, int tensor) const override {
    GradientSizes sizes = lora_gradient_sizes(linear, config_.rank_of(linear.name), tensor);
    (linear.row ? sizes.everywhere : sizes.data) += linear.row ? linear.out : linear.out / tensor;
    return sizes;
  }
  /// The output before a bias is kept. The base's squared norms and three scales are float32 a row.
  UpdateCost update_cost(const LinearSize& linear, int tensor) const override {
    UpdateCost cost = lora_update_cost(config_.rank_of(linear.name));
    const int64_t rows = linear.row ? linear.out : linear.out / tensor;
    cost.keeps_output = !linear.bias && config_.lora_dropout == 0;
    if (!cost.keeps_output) cost.kept += rows;
    cost.state_bytes = 4 * 4 * rows;
    cost.backward.output += 3;  // the kept output, and its gradient times the scale, written and read
    return cost;
  }
  std::vector<StepCollective> statistics(const std::vector<LinearSize>& adapted, int64_t) const override {
    int64_t norms = 0;
    for (const LinearSize& linear : adapted) norms += linear.row ? linear.out : 0;
    return {{Purpose::adapter_statistics, Axis::tp, {Collective::all_reduce, norms, sizeof(float)}}};
  }
  int64_t base_reads() const override { return 1; }  // the norms, after each update
  ModuleParts parts(const std::string& module) const override {
    ModuleParts parts = AdapterMethod::parts(module);
    parts.push_back({kMagnitude, {-1}});
    return parts;
  }
  at::Tensor merged(const std::string& module, const ModuleTensors& tensors, const at::Tensor& w_OI) const override {
    const at::Tensor v_OI =
        w_OI + at::mm(tensors.at(".lora_B.weight"), tensors.at(".lora_A.weight")) * config_.scaling_of(module);
    const at::Tensor n_O = at::linalg_vector_norm(v_OI, 2, {1});
    return (tensors.at(kMagnitude) / n_O).unsqueeze(1) * v_OI;
  }

 private:
  void refresh(Communicator& tp) {
    const at::AutoGradMode no_grad(false);
    if (groups_.empty()) groups_ = grouped(adapters_);
    std::vector<at::Tensor> partial;  // of row-parallel linears: one sum for all of them
    std::vector<int64_t> sizes;
    for (const NormGroup& group : groups_) {
      const at::Tensor squares_MO = group.local_squares();
      if (group.row()) {
        partial.push_back(squares_MO.flatten());
        sizes.push_back(squares_MO.numel());
      } else {
        group.set_squares(squares_MO);
      }
    }
    if (partial.empty()) return;
    const at::Tensor all = at::cat(partial);
    tp.all_reduce(all, ReduceOp::sum, Purpose::adapter_statistics);
    const auto sums = all.split_with_sizes(sizes);
    auto next = sums.begin();
    for (const NormGroup& group : groups_) {
      if (group.row()) group.set_squares((next++)->view({group.size(), -1}));
    }
  }

  std::vector<DoraAdapter*> adapters_;  // owned by their linears
  std::vector<NormGroup> groups_;
};

class DoraEntry : public MethodEntry {
 public:
  std::string name() const override { return "dora"; }
  std::unique_ptr<AdapterMethod> make(const AdapterConfig& config) const override {
    return std::make_unique<Dora>(config);
  }
  std::vector<std::string> common_keys() const override {
    return keys_of_adapters({"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"});
  }
  std::string peft_switch() const override { return "use_dora"; }
  void write_fields(const AdapterConfig& /*config*/, nlohmann::json& fields) const override {
    fields[peft_switch()] = true;
  }
};

}  // namespace

const MethodEntry& dora_method() {
  static const DoraEntry entry;
  return entry;
}

}  // namespace corank
