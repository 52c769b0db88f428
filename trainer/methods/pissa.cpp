#include "trainer/methods/pissa.h"

#include <fmt/format.h>

#include <cmath>

#include "configs/error.h"
#include "trainer/methods/attach.h"
#include "trainer/methods/config_keys.h"
#include "trainer/methods/lora_factors.h"
#include "trainer/methods/methods.h"
#include "trainer/methods/saved_adapter.h"
#include "trainer/ops/random.h"
#include "trainer/ops/svd.h"

// PiSSA (arXiv 2404.02948; methods 8): LoRA that starts at the leading singular part of each weight, over what is left
// of it. The ranks share the decompositions out; the first factors belong to the run's state, because the base under
// training is W - s B0 A0. For consumers the result becomes a LoRA of twice the rank on the original base.
namespace corank {
namespace {

constexpr const char *kA = ".lora_A.weight", *kB = ".lora_B.weight", *kFirstA = ".pissa_A.weight",
                     *kFirstB = ".pissa_B.weight";

const PissaConfig& pissa_config(const AdapterConfig& config) { return config.options.get<PissaConfig>(); }

class Pissa : public AdapterMethod {
 public:
  using AdapterMethod::AdapterMethod;

  void attach(Model& model, ParameterStore& store, uint64_t seed) override {
    store_ = &store;
    seed_ = seed;
    attach_adapters(model, config_, [&](AdaptedLinear& linear) {
      require_rank(linear.site());
      linear.require_full_base();
      auto adapter = std::make_unique<LoraAdapter>(config_.lora_dropout);
      LoraFactors::Options options = lora_options(config_, linear.site(), seed);
      options.fill_a = options.fill_b = nullptr;
      adapter->factors.add_to(store, linear.site(), options);
      linears_.push_back(&linear);
      return adapter;
    });
  }

  void initialise(const Mesh& mesh) override {
    Communicator& world = mesh.world();
    std::vector<Factors> own(linears_.size());
    for (size_t i = 0; i < linears_.size(); ++i) {
      if (owner(i, world) == world.rank()) own[i] = first_factors(*linears_[i]);
    }
    for (size_t i = 0; i < linears_.size(); ++i) {
      const LinearSite& site = linears_[i]->site();
      const int64_t rank = config_.rank_of(site.name);
      for (const auto& [suffix, mine, shape] : {std::tuple{kA, own[i].a_RI, std::vector<int64_t>{rank, site.in}},
                                                std::tuple{kB, own[i].b_OR, std::vector<int64_t>{site.out, rank}}}) {
        const at::Tensor full = mine.defined() ? mine : at::empty(shape, store_->masters().options());
        world.broadcast(full, owner(i, world), Purpose::startup);
        store_->load(peft_name(site.name, suffix), full);
      }
    }
    first_ = store_->masters().clone();
  }

  /// The base under training: W - s B0 A0, rounded or quantised once.
  void begin(const Mesh& mesh) override {
    const auto first = store_->gather(first_, mesh.tp());
    const std::map<std::string, at::Tensor> tensors(first.begin(), first.end());
    for (AdaptedLinear* linear : linears_) {
      const std::string& name = linear->name();
      linear->rebuild([&](const at::Tensor& w_OI) {
        const at::Tensor a = tensors.at(peft_name(name, kA)).to(w_OI), b = tensors.at(peft_name(name, kB)).to(w_OI);
        return w_OI - at::mm(b, a) * config_.scaling_of(name);
      });
    }
  }

  std::vector<std::pair<std::string, at::Tensor>> state() override { return {{"initial", first_}}; }
  std::vector<std::pair<std::string, at::Tensor>> extra_tensors(Communicator& tp) const override {
    std::vector<std::pair<std::string, at::Tensor>> extra;
    for (auto& [name, tensor] : store_->gather(first_, tp)) {
      for (const auto& [suffix, renamed] : {std::pair{kA, kFirstA}, std::pair{kB, kFirstB}}) {
        if (name.ends_with(suffix)) {
          extra.emplace_back(name.substr(0, name.size() - std::string(suffix).size()) + renamed, tensor);
        }
      }
    }
    return extra;
  }

  GradientSizes gradient_sizes(const LinearSize& linear, int tensor) const override {
    return lora_gradient_sizes(linear, config_.rank_of(linear.name), tensor);
  }
  UpdateCost update_cost(const LinearSize& linear, int tensor) const override {
    UpdateCost cost = lora_update_cost(config_.rank_of(linear.name));
    const GradientSizes sizes = gradient_sizes(linear, tensor);
    cost.state_bytes = 4 * (sizes.everywhere + sizes.data);  // state(): the first factors
    return cost;
  }
  at::Tensor merged(const std::string& module, const ModuleTensors& t, const at::Tensor& w_OI) const override {
    at::Tensor update = at::mm(t.at(kB), t.at(kA));
    if (t.contains(kFirstA)) update -= at::mm(t.at(kFirstB), t.at(kFirstA));
    return w_OI + update * config_.scaling_of(module);
  }

  void from_checkpoint(SavedAdapter& file) const override { to_peft(file); }
  /// A' = [A; A0], B' = [B, -B0] with twice the rank and the same scaling (methods 8.5): exact on the original base.
  void to_peft(SavedAdapter& file) const override {
    std::map<std::string, at::Tensor> tensors(file.tensors.begin(), file.tensors.end());
    for (const std::string& module : adapted_modules(file)) {
      const auto take = [&](const char* suffix) {
        const auto found = tensors.find(peft_name(module, suffix));
        if (found != tensors.end() && found->second.dim() == 2) return found->second;
        throw InputError(fmt::format("{} is missing or no matrix. The adapter is damaged; make it again.",
                                     peft_name(module, suffix)));
      };
      if (take(kA).size(1) != take(kFirstA).size(1) || take(kB).size(0) != take(kFirstB).size(0))
        throw InputError(module +
                         ": first and trained factors differ in shape. The adapter is damaged; make it again.");
      tensors[peft_name(module, kA)] = at::cat({take(kA), take(kFirstA)}, 0);
      tensors[peft_name(module, kB)] = at::cat({take(kB), -take(kFirstB)}, 1);
    }
    std::erase_if(file.tensors,
                  [](const auto& entry) { return entry.first.ends_with(kFirstA) || entry.first.ends_with(kFirstB); });
    for (auto& [name, tensor] : file.tensors) tensor = tensors.at(name);
    file.config = exchange_config();
  }
  AdapterConfig exchange_config() const override {
    const double factor = config_.use_rslora ? std::sqrt(2.0) : 2.0;
    AdapterConfig c = config_;
    c.method = "lora";
    c.r *= 2;
    c.lora_alpha *= factor;
    for (auto& entry : c.rank_pattern) entry.second *= 2;
    for (auto& entry : c.alpha_pattern) entry.second *= factor;
    return c;
  }
  std::string beyond_quantised() const override {
    return "a PiSSA result is an adapter of the original weights, and the quantised ones are not those it was trained "
           "on (the quantised residual). Use it on the original weights: model.quantization=none "
           "adapter.pissa_iterations=null, or merge --base original";
  }

 private:
  struct Factors {
    at::Tensor a_RI, b_OR;
  };

  static int owner(size_t i, const Communicator& world) {
    return static_cast<int>(i % static_cast<size_t>(world.size()));
  }

  void require_rank(const LinearSite& site) const {
    const int64_t rank = config_.rank_of(site.name);
    if (rank <= std::min(site.in, site.out)) return;
    throw ConfigError(fmt::format("adapter.r: {} has {} singular values, too few for rank {}. Choose a smaller r.",
                                  site.name, std::min(site.in, site.out), rank));
  }

  /// A0 = sqrt(S / s) V^T, B0 = U sqrt(S / s) of the leading part of `target_OI`.
  Factors decompose(const std::string& module, const at::Tensor& target_OI) const {
    const int64_t rank = config_.rank_of(module);
    const std::optional<int64_t> niter = pissa_config(config_).niter;
    const ops::SingularPart part =
        niter ? ops::randomised_svd(target_OI, rank, *niter, ops::key_of(seed_, "pissa", module))
              : ops::leading_svd(target_OI, rank);
    const at::Tensor root_R = (part.s_R / config_.scaling_of(module)).sqrt_();
    return {(part.v_IR * root_R).t().contiguous(), (part.u_OR * root_R).contiguous()};
  }

  /// QPiSSA (methods 8.6): each round decomposes what the quantised residual of the round before does not hold.
  Factors first_factors(const AdaptedLinear& linear) const {
    const auto dtype = store_->masters().scalar_type();
    const at::Tensor w_OI = linear.read_base().to(dtype);
    Factors factors = decompose(linear.name(), w_OI);
    for (int64_t round = 1; round < pissa_config(config_).iterations; ++round) {
      const at::Tensor residual = w_OI - at::mm(factors.b_OR, factors.a_RI) * config_.scaling_of(linear.name());
      factors = decompose(linear.name(), w_OI - linear.stored_form(residual).to(dtype));
    }
    return factors;
  }

  ParameterStore* store_ = nullptr;
  uint64_t seed_ = 0;
  std::vector<AdaptedLinear*> linears_;  // the model's
  at::Tensor first_;                     // A0 and B0, laid out like the masters
};

class PissaEntry : public MethodEntry {
 public:
  std::string name() const override { return "pissa"; }
  std::unique_ptr<AdapterMethod> make(const AdapterConfig& config) const override {
    return std::make_unique<Pissa>(config);
  }
  std::vector<std::string> common_keys() const override {
    return keys_of_adapters({"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"});
  }
  std::vector<OwnKey> keys() const override {
    using C = const AdapterConfig&;
    return {{"pissa_niter", [](C c) { return pissa_config(c).niter ? fmt::format("{}", *pissa_config(c).niter) : ""; }},
            {"pissa_iterations", [](C c) { return fmt::format("{}", pissa_config(c).iterations); }}};
  }
  void read(const Section& section, AdapterConfig& config) const override {
    PissaConfig& c = config.options.edit<PissaConfig>();
    c.niter = section.get_optional<int64_t>("pissa_niter");
    c.iterations = section.get<int64_t>("pissa_iterations", c.iterations);
  }
  void check(const AdapterConfig& config, const Require& require) const override {
    const PissaConfig& c = pissa_config(config);
    require(c.niter.value_or(0) >= 0, "pissa_niter", c.niter.value_or(0), "a number of iterations");
    require(c.iterations >= 1 && c.iterations <= kMaxIterations, "pissa_iterations", c.iterations,
            "a number of rounds in [1, 1000]");
  }
  void check_format(const AdapterConfig& config, const std::string& format, const Fail& fail) const override {
    if (pissa_config(config).iterations <= 1 || format != "none") return;
    fail("pissa_iterations", "makes up for what quantising loses, and model.quantization is none");
  }

 private:
  static constexpr int64_t kMaxIterations = 1000;
};

}  // namespace

const MethodEntry& pissa_method() {
  static const PissaEntry entry;
  return entry;
}

}  // namespace corank
