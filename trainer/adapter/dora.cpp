#include "trainer/ops/dora.h"

#include <limits>

#include "trainer/adapter/attach.h"
#include "trainer/adapter/lora_factors.h"
#include "trainer/adapter/methods.h"

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

  std::shared_ptr<const ops::Update> update(const ops::Dropout& dropout) const override {
    return std::make_shared<ops::DoraUpdate>(factors_.low_rank(dropout), scale_);
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
  }

  /// This rank's part of the squared norms.
  at::Tensor local_squares() {
    const at::Tensor w_OI = linear_.weight().dense_OI();
    if (!base_square_O_.defined()) {
      base_square_O_ = ops::squared_row_norms(w_OI, scale_.magnitude_leaf_O.scalar_type());
    }
    return ops::squared_row_norms(base_square_O_, w_OI, factors_.low_rank());
  }
  void set_squares(const at::Tensor& square_O) {
    scale_.inverse_norm_O = square_O.clamp_min(std::numeric_limits<float>::min()).rsqrt();
    scale_.gamma_O = scale_.magnitude_leaf_O.detach() * scale_.inverse_norm_O;
  }
  void start_at_norm() { scale_.magnitude_leaf_O.detach().copy_(scale_.inverse_norm_O.reciprocal()); }

 private:
  const AdaptedLinear& linear_;
  double dropout_;
  LoraFactors factors_;
  ops::MagnitudeScale scale_;
  at::Tensor base_square_O_;
};

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
  void on_step_end(int64_t, Optimizer&, const Mesh& mesh) override { refresh(mesh.tp()); }

  GradientSizes gradient_sizes(const LinearSize& linear, int tensor) const override {
    GradientSizes sizes = lora_gradient_sizes(linear, config_.rank_of(linear.name), tensor);
    (linear.row ? sizes.everywhere : sizes.data) += linear.row ? linear.out : linear.out / tensor;
    return sizes;
  }
  int64_t statistics_bytes(const std::vector<LinearSize>& adapted, int tensor, int, int64_t) const override {
    int64_t bytes = 0;
    for (const LinearSize& linear : adapted) bytes += linear.row && tensor > 1 ? 4 * linear.out : 0;
    return bytes;
  }
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
    std::vector<at::Tensor> partial;  // of row-parallel linears: one sum for all of them
    std::vector<int64_t> sizes;
    for (DoraAdapter* adapter : adapters_) {
      const at::Tensor square_O = adapter->local_squares();
      if (adapter->row()) {
        partial.push_back(square_O);
        sizes.push_back(square_O.numel());
      } else {
        adapter->set_squares(square_O);
      }
    }
    if (partial.empty()) return;
    const at::Tensor all = at::cat(partial);
    tp.all_reduce(all, ReduceOp::sum, Purpose::adapter_statistics);
    const auto sums = all.split_with_sizes(sizes);
    size_t next = 0;
    for (DoraAdapter* adapter : adapters_) {
      if (adapter->row()) adapter->set_squares(sums[next++]);
    }
  }

  std::vector<DoraAdapter*> adapters_;  // owned by their linears
};

}  // namespace

std::unique_ptr<AdapterMethod> make_dora(const AdapterConfig& config) { return std::make_unique<Dora>(config); }

}  // namespace corank
