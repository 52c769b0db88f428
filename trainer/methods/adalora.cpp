#include <fmt/format.h>

#include <map>
#include <nlohmann/json.hpp>
#include <tuple>

#include "data/json_object.h"
#include "trainer/methods/attach.h"
#include "trainer/methods/config_keys.h"
#include "trainer/methods/diagonal_update.h"
#include "trainer/methods/lora_factors.h"
#include "trainer/methods/merge_config.h"
#include "trainer/methods/methods.h"
#include "trainer/methods/rank_budget.h"
#include "trainer/methods/saved_adapter.h"
#include "trainer/ops/gram.h"
#include "trainer/ops/random.h"

// AdaLoRA (arXiv 2303.10512) as PEFT has it (methods 7): B diag(E) A, a pull of A and B towards orthonormal rows and
// columns, and a budget of ranks that the modules share. Tensor parallel (methods 10.5): A and B like LoRA's, E
// replicated.
namespace corank {
namespace {

class AdaLoraAdapter : public Adapter {
 public:
  AdaLoraAdapter(const LinearSite& site, double dropout) : site_(site), dropout_(dropout) {}

  std::shared_ptr<const Update> update(const ops::Dropout& dropout) const override {
    return std::make_shared<DiagonalUpdate>(factors_.low_rank(dropout), e_R1_);
  }
  double dropout() const override { return dropout_; }
  const LinearSite& site() const { return site_; }

  void add_to(ParameterStore& store, const LoraFactors::Options& options) {
    factors_.add_to(store, site_, options);
    ParameterSpec e;
    e.name = peft_name(site_.name, ".lora_E");
    e.shape = {options.rank, 1};
    e.scope = GradientScope::everywhere;
    e.bind = [this](const ops::Weight& w) { e_R1_ = w; };
    store.add(std::move(e));
  }

 private:
  const LinearSite& site_;
  double dropout_;
  LoraFactors factors_;
  ops::Weight e_R1_;
};

/// The tensors of one module in a flat buffer laid out like the store's masters.
struct Triplets {
  at::Tensor a_RI, b_OR, e_R1;
};

/// Factors of one shape: many small products are one large one.
struct FactorGroup {
  ops::Orthonormal what = ops::Orthonormal::rows;
  bool sharded = false;  ///< these are blocks, their Gram matrices parts of sums
  std::vector<at::Tensor> masters, gradients;
  at::Tensor stacked_MXY, gram_MRR;
};

class AdaLora : public AdapterMethod {
 public:
  explicit AdaLora(AdapterConfig config)
      : AdapterMethod(std::move(config)), budget_(config_.options.get<AdaLoraConfig>()) {}

  void attach(Model& model, ParameterStore& store, uint64_t seed) override {
    store_ = &store;
    attach_adapters(model, config_, [&](const AdaptedLinear& linear) {
      auto adapter = std::make_unique<AdaLoraAdapter>(linear.site(), config_.lora_dropout);
      adapter->add_to(store, options(linear.name(), seed));
      adapters_.push_back(adapter.get());
      return adapter;
    });
  }

  void initialise(const Mesh&) override {
    for (at::Tensor* buffer : {&importance_, &uncertainty_, &kept_}) *buffer = at::zeros_like(store_->masters());
  }
  std::vector<std::pair<std::string, at::Tensor>> state() override {
    return {{"importance", importance_}, {"uncertainty", uncertainty_}, {"kept", kept_}};
  }

  void add_gradients(int64_t, const Mesh& mesh) override {
    const double weight = budget_.orth_reg_weight / static_cast<double>(2 * adapters_.size());
    std::vector<FactorGroup> groups = factor_groups();
    complete_grams(groups, mesh.tp());
    for (const FactorGroup& group : groups) {
      const at::Tensor pull = ops::orthogonality_gradient(group.gram_MRR, group.stacked_MXY, group.what);
      at::_foreach_add_(group.gradients, pull.unbind(0), weight);
    }
  }

  bool on_step_end(int64_t step, const Mesh& mesh) override {
    if (!pruned()) follow(step, mesh);
    return false;
  }

  GradientSizes gradient_sizes(const LinearSize& linear, int tensor) const override {
    GradientSizes sizes = lora_gradient_sizes(linear, rank_of(linear.name), tensor);
    sizes.everywhere += rank_of(linear.name);
    return sizes;
  }
  UpdateCost update_cost(const LinearSize& linear, int tensor) const override {
    UpdateCost cost = lora_update_cost(rank_of(linear.name));
    const GradientSizes sizes = gradient_sizes(linear, tensor);
    cost.state_bytes = 3 * 4 * (sizes.everywhere + sizes.data);                             // state()
    cost.kept_once = rank_of(linear.name) * (linear.row ? linear.in / tensor : linear.in);  // diag(E) A
    return cost;
  }
  std::vector<StepCollective> statistics(const std::vector<LinearSize>& adapted, int64_t step) const override {
    constexpr Purpose kPurpose = Purpose::adapter_statistics;
    int64_t triplets = 0, grams = 0;
    for (const LinearSize& linear : adapted) {
      const int64_t r = rank_of(linear.name);
      triplets += r;
      grams += r * r;
    }
    std::vector<StepCollective> all{{kPurpose, Axis::tp, {Collective::all_reduce, grams, sizeof(float)}}};
    if (pruned() || masking_at(budget_, step) != Masking::choose) return all;
    all.push_back({kPurpose, Axis::tp, {Collective::all_reduce, triplets, sizeof(float)}});
    all.push_back({kPurpose, Axis::world, {Collective::broadcast, triplets, sizeof(uint8_t)}});
    return all;
  }
  ModuleParts parts(const std::string& module) const override {
    const int64_t r = rank_of(module);
    return {{".lora_A", {r, -1}}, {".lora_B", {-1, r}}, {".lora_E", {r, 1}}};
  }
  at::Tensor merged(const std::string&, const ModuleTensors& tensors, const at::Tensor& w_OI) const override {
    return w_OI + at::mm(tensors.at(".lora_B"), tensors.at(".lora_E") * tensors.at(".lora_A")) * scale();
  }

  std::optional<PlainFactors> plain_factors(const std::string&, const ModuleTensors& tensors) const override {
    const at::Tensor e_R1 = tensors.at(".lora_E"), alive = e_R1.view({-1}).nonzero().view({-1});
    return PlainFactors{tensors.at(".lora_B").index_select(1, alive) * scale(),
                        (e_R1 * tensors.at(".lora_A")).index_select(0, alive)};
  }

  /// Ranks with e = 0 contribute nothing: PEFT's files leave them out and say so in rank_pattern (methods 7.5).
  void to_peft(SavedAdapter& file) const override {
    if (pruned()) return;
    std::map<std::string, at::Tensor> tensors(file.tensors.begin(), file.tensors.end());
    for (const std::string& module : adapted_modules(file)) {
      const auto of = [&](const char* suffix) -> at::Tensor& { return tensors.at(peft_name(module, suffix)); };
      const at::Tensor kept = of(".lora_E").view({-1}) != 0, index = kept.nonzero().view({-1});
      of(".lora_A") = of(".lora_A").index_select(0, index);
      of(".lora_B") = of(".lora_B").index_select(1, index).contiguous();
      of(".lora_E") = of(".lora_E").index_select(0, index);
      const at::Tensor flags = kept.contiguous();
      const bool* first = flags.const_data_ptr<bool>();
      file.config.options.edit<AdaLoraConfig>().kept_ranks[module] = std::vector<bool>(first, first + flags.numel());
    }
    for (auto& [name, tensor] : file.tensors) tensor = tensors.at(name);
  }

 private:
  /// Follows importance and masks what the budget of `step` leaves out.
  void follow(int64_t step, const Mesh& mesh) {
    if (follows_importance(budget_, step)) {
      update_importance(importance_, uncertainty_, store_->masters(), store_->gradients(), budget_);
    }
    const Masking masking = masking_at(budget_, step);
    if (masking == Masking::none) return;
    if (masking == Masking::choose) choose(step, mesh);
    for (size_t i = 0; i < adapters_.size(); ++i) {
      triplets(store_->masters(), i).e_R1.mul_(triplets(kept_, i).e_R1);
    }
    store_->refresh();
  }

  double scale() const { return config_.lora_alpha / (static_cast<double>(budget_.init_r) + 1e-5); }
  /// Loaded after its ranks were chosen: they stay as they are.
  bool pruned() const { return !budget_.kept_ranks.empty(); }
  int64_t rank_of(const std::string& module) const { return budget_.rank_of(module); }

  LoraFactors::Options options(const std::string& module, uint64_t seed) const {
    const auto fill = [seed](const ParameterSpec& spec, const at::Tensor& local) {
      ops::fill_normal(local, ops::key_of(seed, "init", spec.name), 0, 0.02, spec.shape, spec.shard.offset(2));
    };
    return {".lora_A", ".lora_B", rank_of(module), scale(), fill, fill};
  }

  Triplets triplets(const at::Tensor& flat, size_t module) const {
    const auto view = [&](const char* suffix) {
      const auto& p = store_->at(peft_name(adapters_[module]->site().name, suffix));
      return flat.narrow(0, p.begin, p.master.numel()).view(p.master.sizes());
    };
    return {view(".lora_A"), view(".lora_B"), view(".lora_E")};
  }

  std::vector<FactorGroup> factor_groups() const {
    std::map<std::tuple<ops::Orthonormal, bool, std::vector<int64_t>>, FactorGroup> by_shape;
    const auto add = [&](ops::Orthonormal what, bool sharded, const at::Tensor& master, const at::Tensor& gradient) {
      FactorGroup& group = by_shape[{what, sharded, master.sizes().vec()}];
      group.what = what;
      group.sharded = sharded;
      group.masters.push_back(master);
      group.gradients.push_back(gradient);
    };
    for (size_t i = 0; i < adapters_.size(); ++i) {
      const Triplets p = triplets(store_->masters(), i), g = triplets(store_->gradients(), i);
      const bool row = adapters_[i]->site().row();
      add(ops::Orthonormal::rows, row, p.a_RI, g.a_RI);
      add(ops::Orthonormal::columns, !row, p.b_OR, g.b_OR);
    }
    std::vector<FactorGroup> groups;
    for (auto& [shape, group] : by_shape) groups.push_back(std::move(group));
    return groups;
  }

  /// Collective over tp: A A^T and B^T B of every module, whole; those of sharded factors in one sum.
  static void complete_grams(std::vector<FactorGroup>& groups, Communicator& tp) {
    std::vector<at::Tensor> partial;
    std::vector<int64_t> sizes;
    for (FactorGroup& group : groups) {
      group.stacked_MXY = at::stack(group.masters);
      group.gram_MRR = ops::gram(group.stacked_MXY, group.what);
      if (!group.sharded) continue;
      partial.push_back(group.gram_MRR.flatten());
      sizes.push_back(group.gram_MRR.numel());
    }
    if (tp.size() == 1) return;
    const at::Tensor sums = at::cat(partial);
    tp.all_reduce(sums, ReduceOp::sum, Purpose::adapter_statistics);
    const auto parts = sums.split_with_sizes(sizes);
    auto next = parts.begin();
    for (FactorGroup& group : groups) {
      if (group.sharded) group.gram_MRR = (next++)->view(group.gram_MRR.sizes());
    }
  }

  /// Collective over tp: score of every triplet of every module: of e, and the means over its row of A and column of B.
  at::Tensor scores(Communicator& tp) const {
    std::vector<at::Tensor> whole, partial;
    for (size_t i = 0; i < adapters_.size(); ++i) {
      const Triplets ipt = triplets(importance_, i), unc = triplets(uncertainty_, i);
      const LinearSite& site = adapters_[i]->site();
      const at::Tensor a_R = (ipt.a_RI * unc.a_RI).sum(1).div_(static_cast<double>(site.in));
      const at::Tensor b_R = (ipt.b_OR * unc.b_OR).sum(0).div_(static_cast<double>(site.out));
      whole.push_back((ipt.e_R1 * unc.e_R1).view({-1}) + (site.row() ? b_R : a_R));
      partial.push_back(site.row() ? a_R : b_R);
    }
    const at::Tensor sums = at::cat(partial);
    tp.all_reduce(sums, ReduceOp::sum, Purpose::adapter_statistics);
    return at::cat(whole).add_(sums);
  }

  /// Collective over the mesh: the pattern after `step`. Rank 0 decides for all, so that no order of summation can make
  /// ranks differ.
  void choose(int64_t step, const Mesh& mesh) {
    const at::Tensor kept =
        kept_triplets(scores(mesh.tp()), budget_at(budget_, static_cast<int64_t>(adapters_.size()), step))
            .to(at::kByte);
    mesh.world().broadcast(kept, 0, Purpose::adapter_statistics);
    int64_t begin = 0;
    for (size_t i = 0; i < adapters_.size(); ++i) {
      const at::Tensor e_R1 = triplets(kept_, i).e_R1;
      e_R1.copy_(kept.narrow(0, begin, e_R1.numel()).view(e_R1.sizes()));
      begin += e_R1.numel();
    }
  }

  AdaLoraConfig budget_;
  ParameterStore* store_ = nullptr;
  std::vector<AdaLoraAdapter*> adapters_;  // owned by their linears
  at::Tensor importance_, uncertainty_, kept_;
};

constexpr const char* kTripletEnd = ".lora_E";  // of a module's key in rank_pattern

const AdaLoraConfig& adalora_config(const AdapterConfig& config) { return config.options.get<AdaLoraConfig>(); }

/// Calls `visit` with the name and the member of each key, which run files and PEFT's have.
template <class Visit>
void for_each_key(const Visit& visit) {
  visit("init_r", &AdaLoraConfig::init_r);
  visit("target_r", &AdaLoraConfig::target_r);
  visit("tinit", &AdaLoraConfig::tinit);
  visit("tfinal", &AdaLoraConfig::tfinal);
  visit("deltaT", &AdaLoraConfig::deltaT);
  visit("beta1", &AdaLoraConfig::beta1);
  visit("beta2", &AdaLoraConfig::beta2);
  visit("orth_reg_weight", &AdaLoraConfig::orth_reg_weight);
}

class AdaLoraEntry : public MethodEntry {
 public:
  std::string name() const override { return "adalora"; }
  std::unique_ptr<AdapterMethod> make(const AdapterConfig& config) const override {
    return std::make_unique<AdaLora>(config);
  }

  std::vector<std::string> common_keys() const override { return keys_of_adapters({"lora_alpha"}); }
  std::vector<OwnKey> keys() const override {
    std::vector<OwnKey> keys;
    for_each_key([&](const char* key, auto member) {
      keys.push_back({key, [member](const AdapterConfig& c) { return fmt::format("{}", adalora_config(c).*member); }});
    });
    return keys;
  }
  void read(const Section& section, AdapterConfig& config) const override {
    AdaLoraConfig& c = config.options.edit<AdaLoraConfig>();
    for_each_key([&](const char* key, auto member) { c.*member = section.get(key, c.*member); });
  }
  void check(const AdapterConfig& config, const Require& require) const override {
    if (config.method != name()) return;  // a file may still bring the target_r that belongs to init_r
    const AdaLoraConfig& c = adalora_config(config);
    require.rank("init_r", c.init_r);
    require(c.target_r >= 0 && c.target_r <= c.init_r, "target_r", c.target_r, "in [0, init_r]");
    require(c.tinit >= 0, "tinit", c.tinit, "a number of steps");
    require(c.tfinal >= 0, "tfinal", c.tfinal, "a number of steps");
    require(c.deltaT > 0, "deltaT", c.deltaT, "a positive number of steps");
    require(c.beta1 > 0 && c.beta1 < 1, "beta1", c.beta1, "in (0, 1)");
    require(c.beta2 > 0 && c.beta2 < 1, "beta2", c.beta2, "in (0, 1)");
    require(c.orth_reg_weight >= 0 && c.orth_reg_weight <= kMaxNumber, "orth_reg_weight", c.orth_reg_weight,
            "a weight of at least 0");
  }
  void set_total_steps(AdapterConfig& config, int64_t total_steps) const override {
    config.options.edit<AdaLoraConfig>().total_step = total_steps;
  }
  void check_schedule(const AdapterConfig& config, int64_t total_steps) const override {
    const AdaLoraConfig& c = adalora_config(config);
    if (c.tinit < total_steps - c.tfinal) return;
    throw ConfigError(
        fmt::format("adapter.tinit: {} steps at the start and adapter.tfinal: {} at the end leave none of the run's {} "
                    "for choosing "
                    "ranks. Lower them or train longer.",
                    c.tinit, c.tfinal, total_steps));
  }
  int64_t rank_of(const AdapterConfig& config, const std::string& module) const override {
    return adalora_config(config).rank_of(module);
  }

  std::string peft_type() const override { return "ADALORA"; }
  std::vector<OwnField> fields() const override {
    std::vector<OwnField> fields{{"total_step", /*may_be_null=*/true}};
    for_each_key([&](const char* key, auto) { fields.push_back({key}); });
    return fields;
  }
  void read_fields(const JsonObject& file, AdapterConfig& config) const override {
    if (config.method != name()) return;  // to others they mean nothing, rank_pattern something else
    AdaLoraConfig& c = config.options.edit<AdaLoraConfig>();
    for_each_key([&](const char* key, auto member) { c.*member = file.get(key, c.*member); });
    c.total_step = file.get("total_step", c.total_step);
    if (!file.has("rank_pattern")) return;
    const auto kept = file.get<JsonObject>("rank_pattern");
    for (const auto& [module, ranks] : kept.root().items()) {
      c.kept_ranks[module.substr(0, module.rfind(kTripletEnd))] = kept.convert<std::vector<bool>>(ranks, module);
    }
  }
  void write_fields(const AdapterConfig& config, nlohmann::json& fields) const override {
    for (const char* of_lora : {"alpha_pattern", "use_dora", "use_rslora"}) fields.erase(of_lora);
    const AdaLoraConfig& c = adalora_config(config);
    for_each_key([&](const char* key, auto member) { fields[key] = c.*member; });
    nlohmann::json kept;  // null before ranks were chosen
    for (const auto& [module, ranks] : c.kept_ranks) kept[module + kTripletEnd] = ranks;
    fields.update({{"peft_type", peft_type()},
                   {"r", 8},
                   {"init_lora_weights", true},
                   {"total_step", c.total_step},
                   {"rank_pattern", kept}});
  }

  /// The file's ranks; of the schedule what the run file writes.
  void merge(const RunBesideFile& both, AdapterConfig& merged) const override {
    const AdaLoraConfig& run = adalora_config(both.run);
    AdaLoraConfig& c = merged.options.edit<AdaLoraConfig>();
    both.require_same("init_r", run.init_r, c.init_r);
    c.total_step = run.total_step;
    for_each_key([&](const char* key, auto member) {
      if (both.writes(key)) c.*member = run.*member;
    });
  }
};

}  // namespace

const MethodEntry& adalora_method() {
  static const AdaLoraEntry entry;
  return entry;
}

}  // namespace corank
