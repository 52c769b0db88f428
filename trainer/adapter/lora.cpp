#include <cmath>

#include "trainer/adapter/attach.h"
#include "trainer/adapter/methods.h"
#include "trainer/model/model.h"
#include "trainer/ops/random.h"

// LoRA (arXiv 2106.09685) and rsLoRA (2312.03732), with PEFT's initialisation and scaling (methods 1.3, 2). Tensor
// parallel by the weight-side schedule (methods 10.1): the factor that a split does not touch is replicated, its
// gradient a partial sum.
namespace corank {
namespace {

class LoraAdapter : public Adapter {
 public:
  LoraAdapter(double scaling, double dropout) : scaling_(scaling), dropout_(dropout) {}
  ops::LowRank low_rank() const override { return {a_RI_, b_OR_, scaling_, {}}; }
  double dropout() const override { return dropout_; }

  /// A of a column-parallel linear and B of a row-parallel one are replicated.
  void add_to(ParameterStore& store, const LinearSite& site, const AdapterConfig& config, uint64_t seed) {
    const int64_t rank = config.rank_of(site.name);
    ParameterSpec a, b;
    a.name = "base_model.model." + site.name + ".lora_A.weight";
    a.shape = {rank, site.in};
    a.shard = site.in_shard;
    if (!a.shard.whole()) a.shard.dim = 1;
    a.scope = site.split == Split::column ? GradientScope::everywhere : GradientScope::data;
    a.initialise = initialise_a(config, seed, a, site.in, rank);
    a.bind = [this](const ops::Weight& w) { a_RI_ = w; };
    b.name = "base_model.model." + site.name + ".lora_B.weight";
    b.shape = {site.out, rank};
    b.shard = site.out_shard;
    b.scope = site.split == Split::row ? GradientScope::everywhere : GradientScope::data;
    b.bind = [this](const ops::Weight& w) { b_OR_ = w; };
    store.add(std::move(a));
    store.add(std::move(b));
  }

 private:
  /// kaiming_uniform(a = sqrt 5) is U(-1/sqrt in, 1/sqrt in) with the full fan-in; gaussian is N(0, 1/r^2). B starts at
  /// 0.
  static std::function<void(const at::Tensor&)> initialise_a(const AdapterConfig& config, uint64_t seed,
                                                             const ParameterSpec& spec, int64_t in, int64_t rank) {
    const uint64_t key = ops::key_of(seed, "init", spec.name);
    const bool gaussian = config.init_lora_weights == "gaussian";
    return [=, shape = spec.shape, shard = spec.shard](const at::Tensor& local) {
      const auto offset = shard.offset(2);
      const double bound = 1 / std::sqrt(static_cast<double>(in));
      if (gaussian) {
        ops::fill_normal(local, key, 0, 1 / static_cast<double>(rank), shape, offset);
      } else {
        ops::fill_uniform(local, key, -bound, bound, shape, offset);
      }
    };
  }

  double scaling_, dropout_;
  ops::Weight a_RI_, b_OR_;
};

class Lora : public AdapterMethod {
 public:
  explicit Lora(AdapterConfig config) : config_(std::move(config)) {}

  void attach(Model& model, ParameterStore& store, uint64_t seed) override {
    attach_adapters(model, config_, [&](const LinearSite& site) {
      auto adapter = std::make_unique<LoraAdapter>(config_.scaling_of(site.name), config_.lora_dropout);
      adapter->add_to(store, site, config_, seed);
      return adapter;
    });
  }

 private:
  AdapterConfig config_;
};

}  // namespace

std::unique_ptr<AdapterMethod> make_lora(const AdapterConfig& config) { return std::make_unique<Lora>(config); }

}  // namespace corank
