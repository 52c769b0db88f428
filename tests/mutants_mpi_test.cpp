#include "configs/error.h"
#include "tests/conformance.h"
#include "trainer/methods/mora_update.h"

// Tests of the tests: errors that are planted from outside into the parts of a run. The rule of conformance.h that is
// there to find one must hold without it and break with it.
namespace corank::test {
namespace {

constexpr double kSeen = 100 * kSingle;  ///< far beyond rounding

int ranks() { return test_world().size(); }

Combination plain(const std::string& method) { return {{method, small(method)}, "none"}; }

/// The same ranks as a mesh that splits nothing: what a method sums over tp stays this rank's part.
const Mesh& unsplit() { return shared_mesh(&test_world(), 1).mesh; }

/// A method of which a subclass changes one thing.
class Altered : public AdapterMethod {
 public:
  explicit Altered(std::unique_ptr<AdapterMethod> method)
      : AdapterMethod(method->config()), method_(std::move(method)) {}
  void attach(Model& model, ParameterStore& store, uint64_t seed) override { method_->attach(model, store, seed); }
  void begin(const Mesh& mesh) override { method_->begin(mesh); }
  void add_gradients(int64_t step, const Mesh& mesh) override { method_->add_gradients(step, mesh); }
  bool on_step_end(int64_t step, const Mesh& mesh) override { return method_->on_step_end(step, mesh); }
  std::vector<std::pair<std::string, at::Tensor>> state() override { return method_->state(); }
  GradientSizes gradient_sizes(const LinearSize& linear, int tensor) const override {
    return method_->gradient_sizes(linear, tensor);
  }
  UpdateCost update_cost(const LinearSize& linear, int tensor) const override {
    return method_->update_cost(linear, tensor);
  }
  at::Tensor merged(const std::string& module, const ModuleTensors& tensors, const at::Tensor& w_OI) const override {
    return method_->merged(module, tensors, w_OI);
  }

 private:
  std::unique_ptr<AdapterMethod> method_;
};

/// Statistics of each rank's own part.
class OwnStatistics : public Altered {
 public:
  using Altered::Altered;
  bool on_step_end(int64_t step, const Mesh&) override { return Altered::on_step_end(step, unsplit()); }
};

/// What does not come from the loss is added when early() is called.
class Early : public Altered {
 public:
  using Altered::Altered;
  void add_gradients(int64_t, const Mesh&) override {}
  void early(int64_t step, const Mesh& mesh) { Altered::add_gradients(step, mesh); }
};

template <class Method>
Method& alter(TinyRun& run) {
  auto altered = std::make_unique<Method>(std::move(run.method));
  Method& result = *altered;
  run.method = std::move(altered);
  return result;
}

/// The rule of equal losses: `run`, split over all ranks, against the ranks side by side.
double layout_deviation(const Combination& c, const std::vector<double>& losses) {
  TinyRun side_by_side(&test_world(), 1, c);
  return loss_deviation(losses, losses_of(side_by_side, static_cast<int64_t>(losses.size())));
}

TEST(Mutants, DoraWithoutTheSumOfRowParallelNorms) {
  Layers layers(&test_world(), ranks(), plain("dora"), at::kFloat);
  const Parts p = parts_of(layers);
  randomise(p);
  EXPECT_LT(merged_deviation(p, Split::row).forward, kSingle);
  p.method.begin(unsplit());
  EXPECT_GT(merged_deviation(p, Split::row).forward, kSeen);
  EXPECT_LT(merged_deviation(p, Split::column).forward, kSingle) << "nothing is summed there";
  p.method.initialise(unsplit());
  EXPECT_GT(norm_deviation(p, Split::row), kSeen);
}

TEST(Mutants, DoraWhoseNormsAreNotSummedInTraining) {
  TinyRun right(&test_world(), ranks(), plain("dora")), wrong(&test_world(), ranks(), plain("dora"));
  alter<OwnStatistics>(wrong);
  EXPECT_LT(layout_deviation(plain("dora"), losses_of(right, 3)), kSingle);
  EXPECT_GT(layout_deviation(plain("dora"), losses_of(wrong, 3)), kSeen);
}

/// The function lets the norms follow A and B, the backward takes them as constants: seen as is the reverse.
TEST(Mutants, DoraNormsThatAreNotHeldConstant) {
  for (const Split split : {Split::column, Split::row}) {
    Layers layers(&test_world(), ranks(), plain("dora"), at::kDouble);
    const Parts p = parts_of(layers);
    randomise(p);
    EXPECT_LT(gradient_deviation(p, split, follow_magnitudes(p)), kGradient);
    EXPECT_GT(gradient_deviation(p, split, [&](const ParameterSpec&) { p.method.begin(p.mesh); }), 1e-2);
  }
}

TEST(Mutants, AdaLoraRegulariserAddedBeforeTheReduction) {
  Layers layers(&test_world(), ranks(), plain("adalora"), at::kDouble);
  const Parts p = parts_of(layers);
  randomise(p);
  for (const Split split : {Split::column, Split::row}) {
    const auto add = [&] { p.method.add_gradients(1, p.mesh); };
    EXPECT_LT(regulariser_deviation(p, split, [&] { reduce_gradients(p), add(); }), kGradient);
    EXPECT_GT(regulariser_deviation(p, split, [&] { add(), reduce_gradients(p); }), 1e-2);
  }
}

TEST(Mutants, AdaLoraRegulariserCountedOncePerRankInTraining) {
  TinyRun right(&test_world(), ranks(), plain("adalora")), wrong(&test_world(), ranks(), plain("adalora"));
  Early& method = alter<Early>(wrong);
  std::vector<double> losses;
  for (int64_t step = 1; step <= 6; ++step) {
    method.early(step, wrong.mesh);
    losses.push_back(wrong.train(step));
  }
  EXPECT_LT(layout_deviation(plain("adalora"), losses_of(right, 6)), kSingle);
  EXPECT_GT(layout_deviation(plain("adalora"), losses), 2 * kSingle);
}

TEST(Mutants, AdaLoraRanksChosenByMeansOfOwnShards) {
  const auto kept_after = [](TinyRun& run) {
    std::vector<at::Tensor> kept;
    losses_of(run, 6, [&] { kept.push_back(kept_ranks(parts_of(run))); });
    return at::stack(kept);
  };
  TinyRun side_by_side(&test_world(), 1, plain("adalora")), right(&test_world(), ranks(), plain("adalora")),
      wrong(&test_world(), ranks(), plain("adalora"));
  alter<OwnStatistics>(wrong);
  const at::Tensor expected = kept_after(side_by_side);
  EXPECT_TRUE(at::equal(kept_after(right), expected));
  EXPECT_FALSE(at::equal(kept_after(wrong), expected));
}

/// Scope data in place of everywhere.
TEST(Mutants, ReplicatedFactorsWhoseGradientsAreNotSummedOverTp) {
  for (const char* method : {"lora", "dora", "adalora", "mora", "pissa"}) {
    TinyRun right(&test_world(), ranks(), plain(method)), wrong(&test_world(), ranks(), plain(method));
    const at::Tensor all = wrong.store.gradients();
    wrong.sum = plain_sum().make(wrong.mesh, {all.narrow(0, 0, 0), all, wrong.method->gradient_purpose()});
    EXPECT_LT(layout_deviation(plain(method), losses_of(right, 3)), kSingle) << method;
    EXPECT_EQ(unequal_replicas(right.mesh, right.store), std::vector<std::string>{}) << method;
    EXPECT_GT(layout_deviation(plain(method), losses_of(wrong, 3)), 2 * kSingle) << method;
    EXPECT_NE(unequal_replicas(wrong.mesh, wrong.store), std::vector<std::string>{}) << method;
  }
}

struct Slicing {
  FormatOptions format;
  int dim;
  bool harmless;  ///< no statistic spans what the ranks hold
};

/// Blocks of nf4 are 64 neighbours of the flat weight, and their statistics again blocks of 256: 128 x 192 has shards
/// of whole rows that cut no block of the former and some of the latter.
TEST(Mutants, WeightsSlicedBeforeTheyAreQuantised) {
  const std::vector<int64_t> shape{128, 192};
  const at::Tensor w_OI = random_tensor("w", shape, at::kFloat, 0.02);
  StoredWeight stored{"w", [&](const Shard& shard) { return take_shard(w_OI, shard).contiguous(); },
                      [] { return std::nullopt; }};
  const Mesh& mesh = shared_mesh(&test_world(), ranks()).mesh;
  const auto options = [&](const std::string& name, bool double_quant) {
    return FormatOptions{name, double_quant, at::kFloat, mesh.device()};
  };
  for (const auto& [format, dim, harmless] :
       {Slicing{options("nf4", true), 0, false}, Slicing{options("nf4", true), 1, false},
        Slicing{options("nf4", false), 0, true}, Slicing{options("nf4", false), 1, false},
        Slicing{options("int8", true), 0, true}, Slicing{options("int8", true), 1, false},
        Slicing{options("none", true), 1, true}}) {
    const Shard shard = Shard::of(dim, shape[dim], mesh.tp());
    StoredWeight slice = stored;
    slice.read = [&](const Shard&) { return stored.read(shard); };
    const at::Tensor whole = make_frozen_weight(format, stored, {})->dense_OI();
    const auto joined = [&](const std::unique_ptr<FrozenWeight>& weight) {
      return gather_shards(weight->dense_OI(), shard, shape, mesh.tp());
    };
    EXPECT_TRUE(at::equal(joined(make_frozen_weight(format, stored, shard)), whole)) << format.name << dim;
    EXPECT_EQ(at::equal(joined(make_frozen_weight(format, slice, {})), whole), harmless) << format.name << dim;
  }
}

/// MoRA on an input that is filled up with zeros to whole groups, where its first columns should stand again.
class ZeroPadded : public Update {
 public:
  ZeroPadded(const LinearSite& site, const ops::Weight& m_RR, ops::Grouping grouping)
      : padding_(-site.in % m_RR.value.size(0) + m_RR.value.size(0)),
        zeros_(at::zeros({site.out, site.in + padding_}, m_RR.value.options())),
        mora_(padded_mora(site, m_RR, grouping, site.in + padding_)) {}
  std::vector<at::Tensor> leaves() const override { return mora_.leaves(); }
  at::Tensor forward(const at::Tensor& x_NI, const Matrix& w, const at::Tensor& bias_O,
                     std::vector<at::Tensor>& saved) const override {
    const at::Tensor update = mora_.forward(at::constant_pad_nd(x_NI, {0, padding_}), zeros_, {}, saved);
    return update + w.multiply(x_NI, bias_O);
  }
  void backward(const at::Tensor&, const at::Tensor&, const Matrix&, const std::vector<at::Tensor>&,
                const InputGradient&) const override {}

 private:
  static ops::Mora padded_mora(const LinearSite& site, const ops::Weight& m_RR, ops::Grouping grouping, int64_t in) {
    ops::Mora mora;
    mora.m_RR = m_RR;
    mora.compress = mora.decompress = grouping;
    mora.in = {in, 0, in};
    mora.out = {site.out, 0, site.out};
    mora.rotation = ops::rotation_of(mora.side(), in, site.out, m_RR.value.options().requires_grad(false));
    return mora;
  }

  int64_t padding_;
  DenseMatrix zeros_;
  MoraUpdate mora_;
};

class FixedAdapter : public Adapter {
 public:
  explicit FixedAdapter(std::shared_ptr<const Update> update) : update_(std::move(update)) {}
  std::shared_ptr<const Update> update(const ops::Dropout&) const override { return update_; }
  double dropout() const override { return 0; }

 private:
  std::shared_ptr<const Update> update_;
};

TEST(Mutants, MoraPaddingThatDoesNotWrapAround) {
  for (const auto& [type, grouping] : {std::pair{1, ops::Grouping::modulo}, std::pair{6, ops::Grouping::rotate}}) {
    Combination mora = plain("mora");
    mora.variant.config.options.edit<MoraConfig>().type = type;
    Layers layers(nullptr, 1, mora, at::kFloat);
    const Parts p = parts_of(layers);
    randomise(p);
    for (const Split split : {Split::column, Split::row}) EXPECT_LT(merged_deviation(p, split).forward, kSingle);
    for (AdaptedLinear* linear : p.model.linears()) {
      const ops::Weight& m_RR = p.store.at(peft_name(linear->name(), ".lora_A.weight")).weight;
      linear->set_adapter(std::make_unique<FixedAdapter>(std::make_shared<ZeroPadded>(linear->site(), m_RR, grouping)));
    }
    for (const Split split : {Split::column, Split::row}) EXPECT_GT(merged_deviation(p, split).forward, kSeen);
  }
}

TEST(Mutants, AGradientOffByAMillionth) {
  Layers layers(nullptr, 1, plain("lora"), at::kDouble);
  const Parts p = parts_of(layers);
  const at::Tensor x = random_tensor("x", {20}, at::kDouble), slope = random_tensor("slope", {20}, at::kDouble);
  const auto deviation = [&](const at::Tensor& gradient) {
    Slopes slopes(p, 1e-3);
    slopes.add("x", x, gradient, {}, {20}, [&] { return (x * slope).sum().item<double>(); });
    return slopes.worst();
  };
  EXPECT_LT(deviation(slope), kGradient);
  EXPECT_GT(deviation(slope * (1 + 1e-6)), kGradient);
  EXPECT_GT(deviation(slope * 0), 1) << "no gradient at all";
}

using Collectives = std::function<void(Communicator&)>;

/// Calls collectives of its own beside those of the method, on the ranks that are told to.
class Beside : public Altered {
 public:
  using Altered::Altered;
  void add_gradients(int64_t step, const Mesh& mesh) override {
    if (own) own(mesh.world());  // the group of the next collective of a step
    Altered::add_gradients(step, mesh);
  }
  Collectives own;
};

/// Why a step of a method with collectives of its own came to nothing; "" if it did not.
std::string refusal_beside(const Collectives& own) {
  TinyRun run(&test_world(), ranks(), plain("lora"));
  alter<Beside>(run).own = own;
  try {
    run.train(1);
  } catch (const DisagreeError& e) {
    return e.what();
  }
  return "";
}

TEST(Mutants, CollectivesThatNotAllRanksCall) {
  const bool first = test_world().rank() == 0;
  const auto sum_for = [](Purpose purpose) {
    return Collectives([purpose](Communicator& world) { world.all_reduce(at::ones({3}), ReduceOp::sum, purpose); });
  };
  EXPECT_EQ(refusal_beside(sum_for(Purpose::adapter_statistics)), "");
  const std::string alone = refusal_beside(first ? sum_for(Purpose::adapter_statistics) : nullptr);
  EXPECT_NE(alone.find("differ in type, number of elements, purpose."), std::string::npos) << alone;
  const std::string other = refusal_beside(sum_for(first ? Purpose::adapter_statistics : Purpose::gradient_norm));
  EXPECT_NE(other.find("differ in purpose."), std::string::npos) << other;
}

TEST(Mutants, ABaseWeightThatMoves) {
  TinyRun run(nullptr, 1, plain("lora"));
  const Parts p = parts_of(run);
  const Weights before = frozen_weights(p);
  losses_of(run, 1);
  EXPECT_EQ(names_where(/*equal=*/false, before, frozen_weights(p)), std::vector<std::string>{});
  p.model.linears()[3]->weight().dense_OI().view({-1})[5] += 1e-6;
  EXPECT_EQ(names_where(/*equal=*/false, before, frozen_weights(p)),
            std::vector<std::string>{p.model.linears()[3]->name() + ".weight"});
}

}  // namespace
}  // namespace corank::test
