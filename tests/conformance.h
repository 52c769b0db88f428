#pragma once
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "tests/mpi_main.h"
#include "tests/support.h"
#include "trainer/methods/lora_factors.h"
#include "trainer/methods/mora.h"
#include "trainer/methods/pissa.h"
#include "trainer/methods/rank_budget.h"
#include "trainer/ops/gram.h"
#include "trainer/ops/random.h"
#include "trainer/run/checkpoint.h"

// What every method has to do over every format, split in either style, in every layout. Each rule is a function that
// says how far a run is from it: conformance_mpi_test holds the tables against it, mutants_mpi_test planted errors.
namespace corank::test {

constexpr double kSingle = 1e-5;    ///< relative, of what float32 adds up in another order
constexpr double kGradient = 1e-7;  ///< of slopes in float64
constexpr int64_t kTokens = 5;      ///< rows of the inputs that linears get

/// A method with keys that make something else of it.
struct Variant {
  std::string name;  ///< of test cases: begins with the method's, or with rslora
  AdapterConfig config;
};

struct Combination {
  Variant variant;
  std::string format;

  std::string name() const { return format == "none" ? variant.name : variant.name + "_" + format; }
  AdapterConfig config() const { return variant.config; }
  bool trains_base() const { return make_method(variant.config)->trains_base(); }
};

inline void PrintTo(const Combination& c, std::ostream* out) { *out << c.name(); }

/// `method` with sizes that divide none of the model's, so that nothing fits by chance.
inline AdapterConfig small(const std::string& method) {
  AdapterConfig config;
  config.method = method;
  config.r = 5;
  config.options.edit<AdaLoraConfig>() = {
      .init_r = 5, .target_r = 3, .tinit = 1, .tfinal = 2, .deltaT = 1, .total_step = 6, .kept_ranks = {}};
  return config;
}

/// Every method of the table as it is, and its variants.
inline std::vector<Variant> variants() {
  std::vector<Variant> all;
  for (const std::string& method : method_names()) all.push_back({method, small(method)});
  const auto add = [&](const std::string& name, const std::string& method, const auto& change) {
    all.push_back({name, small(method)});
    change(all.back().config);
  };
  add("rslora", "lora", [](AdapterConfig& c) { c.use_rslora = true; });
  add("lora_dropout", "lora", [](AdapterConfig& c) { c.lora_dropout = 0.2; });
  add("lora_patterns", "lora", [](AdapterConfig& c) {
    c.rank_pattern = {{"q_proj", 3}, {"down_proj", 7}};
    c.alpha_pattern = {{"o_proj", 4}};
  });
  add("lora_modules_to_save", "lora", [](AdapterConfig& c) {
    c.modules_to_save = {"embed_tokens", "norm", "lm_head"};
  });
  add("dora_dropout", "dora", [](AdapterConfig& c) { c.lora_dropout = 0.2; });
  add("pissa_niter", "pissa", [](AdapterConfig& c) { c.options.edit<PissaConfig>().niter = 4; });
  for (const int64_t type : {2, 3, 4, 6}) {
    add("mora_" + std::to_string(type), "mora", [&](AdapterConfig& c) { c.options.edit<MoraConfig>().type = type; });
  }
  return all;
}

/// What run files refuse (the table of refusals in run_config_test.cpp): weights that train are not quantised.
inline bool refused(const Combination& c) { return c.trains_base() && c.format != "none"; }

/// Methods and formats that belong together.
inline std::vector<Combination> combinations() {
  std::vector<Combination> all;
  for (const Variant& variant : variants()) {
    for (const std::string& format : format_names()) {
      if (const Combination c{variant, format}; !refused(c)) all.push_back(c);
    }
  }
  return all;
}

inline ModelOptions tiny_model(const std::string& format, at::ScalarType dtype) {
  ModelOptions options;
  options.shape = "tiny-llama";
  options.dtype = dtype;
  options.quantization = format;
  options.max_positions = 64;
  return options;
}

/// What the rules look at. Borrowed.
struct Parts {
  const Mesh& mesh;
  Model& model;
  AdapterMethod& method;
  ParameterStore& store;
};

template <class Run>
Parts parts_of(Run& run) {
  return {run.mesh, *run.model, *run.method, run.store};
}

/// Model and method without a training loop, in float32 or float64.
struct Layers {
  Layers(const World* world, int tensor, const Combination& c, at::ScalarType dtype)
      : mesh(shared_mesh(world, tensor).mesh), method(make_method(c.config())) {
    ModelOptions options = tiny_model(c.format, dtype);
    options.device = mesh.device();
    model = load_model(options, mesh.tp());
    start_method(*method, *model, store, mesh, dtype, 42);
  }

  const Mesh& mesh;  ///< shared
  std::unique_ptr<Model> model;
  std::unique_ptr<AdapterMethod> method;
  ParameterStore store;
};

/// Normal numbers, the same on every rank; `what` names them.
inline at::Tensor random_tensor(const std::string& what, std::vector<int64_t> shape, const at::TensorOptions& options,
                                double std = 1) {
  const at::Tensor t = at::empty(shape, options);
  ops::fill_normal(t, ops::key_of(1, "test", what), 0, std, shape, std::vector<int64_t>(shape.size(), 0));
  return t;
}

/// Gives every parameter random values: vectors around 1, matrices such that updates are as large as weights.
inline void randomise(const Parts& p) {
  for (const auto& parameter : p.store.parameters()) {
    const ParameterSpec& spec = parameter.spec;
    const bool vector = spec.shape.size() == 1 || spec.shape.back() == 1;
    const at::Tensor full = random_tensor(spec.name, spec.shape, p.store.masters().options(), vector ? 0.2 : 0.05);
    p.store.load(spec.name, vector ? full + 1 : full);
  }
  p.store.refresh();
  p.method.begin(p.mesh);
}

/// The linears of the first layer in one style.
inline std::vector<const AdaptedLinear*> linears_of(const Parts& p, Split split) {
  std::vector<const AdaptedLinear*> found;
  for (const AdaptedLinear* linear : p.model.linears()) {
    if (linear->site().split == split && linear->name().find(".0.") != std::string::npos) found.push_back(linear);
  }
  return found;
}

inline Shard with_dim(Shard shard, int dim) {
  if (!shard.whole()) shard.dim = dim;
  return shard;
}

/// This rank's columns of `x` [N, in] for `site`.
inline at::Tensor local_input(const LinearSite& site, const at::Tensor& x) {
  return site.row() ? take_shard(x, with_dim(site.in_shard, 1)).contiguous() : x;
}

/// A forward pass of single linears. Training: dropout is drawn.
class Pass {
 public:
  Pass(const Parts& p, bool training)
      : batch_(slots(p)),
        attention_(batch_),
        dropout_(7, p.mesh.device()),
        context_{batch_, attention_, p.mesh.tp(), training ? &dropout_ : nullptr} {
    dropout_.begin(1);
  }

  /// This rank's rows of a column-parallel linear's output, its part of the sum of a row-parallel one's.
  at::Tensor operator()(const AdaptedLinear& linear, const at::Tensor& local_x) const {
    return project(local_x, {linear.projection(context_)})[0];
  }

 private:
  static Batch slots(const Parts& p) {
    Batch batch;
    batch.slots_N = at::arange(kTokens, at::TensorOptions(at::kLong).device(p.mesh.device()));
    return batch;
  }

  Batch batch_;
  SegmentAttention attention_;
  DropoutKeys dropout_;
  ForwardContext context_;
};

// ---- forward is the product with the merged weight -----------------------------------------------------------------

/// Full tensors of `module`, adapter's or base's, by the end of their names.
inline ModuleTensors tensors_of(const SavedAdapter& file, const std::string& module) {
  ModuleTensors tensors;
  for (const auto& [name, tensor] : file.tensors) {
    const size_t found = name.find(module + ".");
    if (found != std::string::npos) tensors.emplace(name.substr(found + module.size()), tensor);
  }
  return tensors;
}

/// The whole weight that the update is added to, as the run has it: frozen and in its format. The base under PiSSA's
/// training lacks the first factors; merging takes them away.
inline at::Tensor base_of(const Parts& p, const AdaptedLinear& linear, const ModuleTensors& tensors) {
  const LinearSite& site = linear.site();
  if (p.method.trains_base()) return linear.read_base().to(at::kCPU);
  const Shard shard = site.row() ? with_dim(site.in_shard, 1) : site.out_shard;
  const at::Tensor base =
      gather_shards(linear.weight().dense_OI(), shard, {site.out, site.in}, p.mesh.tp()).to(at::kCPU);
  const auto first_a = tensors.find(".pissa_A.weight");
  if (first_a == tensors.end()) return base;
  return base + at::mm(tensors.at(".pissa_B.weight"), first_a->second) * p.method.config().scaling_of(site.name);
}

struct MergedDeviation {
  double forward = 0;                                       ///< largest relative error of an output
  double update = std::numeric_limits<double>::infinity();  ///< smallest relative size of an update: was it seen?
};

/// Collective over tp.
inline MergedDeviation merged_deviation(const Parts& p, Split split) {
  const at::AutoGradMode no_grad(false);
  const SavedAdapter file = collect_adapter(p.store, p.method, {"", p.method.config(), ""}, p.mesh.tp());
  const Pass pass(p, /*training=*/false);
  MergedDeviation worst;
  for (const AdaptedLinear* linear : linears_of(p, split)) {
    const LinearSite& site = linear->site();
    const ModuleTensors tensors = tensors_of(file, site.name);
    const at::Tensor base = base_of(p, *linear, tensors), merged = p.method.merged(site.name, tensors, base);
    const at::Tensor x = random_tensor(site.name, {kTokens, site.in}, base.options());
    at::Tensor y = pass(*linear, local_input(site, x.to(p.mesh.device())));
    if (site.row()) {
      p.mesh.tp().all_reduce(y, ReduceOp::sum, Purpose::startup);
    } else {
      y = gather_shards(y, with_dim(site.out_shard, 1), {kTokens, site.out}, p.mesh.tp());
    }
    worst.forward = std::max(worst.forward, relative_error(y, at::mm(x, merged.t())));
    worst.update = std::min(worst.update, relative_error(merged, base));
  }
  return worst;
}

/// Collective over tp. DoRA's magnitudes against the row norms of W + s B A, for adapters that start where they are.
inline double norm_deviation(const Parts& p, Split split) {
  const SavedAdapter file = collect_adapter(p.store, p.method, {"", p.method.config(), ""}, p.mesh.tp());
  double worst = 0;
  for (const AdaptedLinear* linear : linears_of(p, split)) {
    const ModuleTensors tensors = tensors_of(file, linear->name());
    const at::Tensor update = at::mm(tensors.at(".lora_B.weight"), tensors.at(".lora_A.weight"));
    const at::Tensor sum = base_of(p, *linear, tensors) + update * p.method.config().scaling_of(linear->name());
    worst = std::max(worst, relative_error(tensors.at(".lora_magnitude_vector"), at::linalg_vector_norm(sum, 2, {1})));
  }
  return worst;
}

/// Collective over tp. The frozen weights of one style, whole, one after another.
inline at::Tensor full_weights(const Parts& p, Split split) {
  std::vector<at::Tensor> flat;
  for (const AdaptedLinear* linear : linears_of(p, split)) flat.push_back(base_of(p, *linear, {}).flatten());
  return at::cat(flat);
}

// ---- gradients are finite differences ------------------------------------------------------------------------------

/// Called after a parameter was moved: what a method keeps of it has to follow.
using Follow = std::function<void(const ParameterSpec&)>;

/// DoRA's magnitudes act through the constants of a step; the norms among these stay those of A and B as they are.
inline Follow follow_magnitudes(const Parts& p) {
  return [p](const ParameterSpec& spec) {
    if (spec.name.ends_with(".lora_magnitude_vector")) p.method.begin(p.mesh);
  };
}

/// Slopes of a function that is a sum over tp: by a gradient, and by central differences. Everything is this rank's
/// part until worst() adds up.
class Slopes {
 public:
  Slopes(const Parts& p, double h) : p_(p), h_(h) {}

  /// Two directions of a tensor of shape `shape`. `variable` and `gradient`: this rank's block of it and of the whole
  /// gradient; `value`: this rank's part of the function; `moved`: called when the block has changed.
  void add(
      const std::string& what, const at::Tensor& variable, const at::Tensor& gradient, const Shard& shard,
      const std::vector<int64_t>& shape, const std::function<double()>& value,
      const std::function<void()>& moved = [] {}) {
    const at::AutoGradMode no_grad(false);
    const double share = shard.whole() ? 1.0 / p_.mesh.tp().size() : 1;
    const at::Tensor start = variable.clone();
    for (const char* direction : {" first", " second"}) {
      const at::Tensor along = take_shard(random_tensor(what + direction, shape, variable.options()), shard);
      const auto at_distance = [&](double distance) {
        variable.copy_(start + along * distance);
        moved();
        return value();
      };
      const double numeric = (at_distance(h_) - at_distance(-h_)) / (2 * h_);
      differences_.push_back(numeric - share * (gradient * along).sum().item<double>());
      squares_.push_back(share * gradient.square().sum().item<double>());
    }
    variable.copy_(start);
    moved();
  }

  /// Collective over tp. The largest difference in units of its gradient's norm; infinite where there is no gradient.
  double worst() const {
    const auto options = p_.store.masters().options();
    const at::Tensor sums = at::cat({at::tensor(differences_, options), at::tensor(squares_, options)});
    p_.mesh.tp().all_reduce(sums, ReduceOp::sum, Purpose::startup);
    const auto parts = sums.to(at::kCPU).chunk(2);
    return at::where(parts[1] > 0, parts[0].abs() / parts[1].sqrt(), std::numeric_limits<double>::infinity())
        .max()
        .item<double>();
  }

 private:
  Parts p_;
  double h_;
  std::vector<double> differences_, squares_;
};

/// A linear, its input, and what its outputs are weighted by: this rank's parts. Their weighted sum, added up over tp,
/// is that of the whole linear in both styles.
struct Probe {
  Probe(const Parts& p, const AdaptedLinear& l) : linear(&l) {
    const LinearSite& site = l.site();
    const auto options = p.store.masters().options();
    const at::Tensor all = random_tensor(site.name + " weights", {kTokens, site.out}, options);
    weights = site.row() ? all : take_shard(all, with_dim(site.out_shard, 1));
    x = local_input(site, random_tensor(site.name, {kTokens, site.in}, options)).clone().requires_grad_();
  }
  at::Tensor weighted(const Pass& pass) const { return (pass(*linear, x) * weights).sum(); }

  const AdaptedLinear* linear;
  at::Tensor weights, x;
};

/// Collective over tp; float64. Backward of every linear of one style, dropout drawn: all its parameters and its input.
inline double gradient_deviation(const Parts& p, Split split, const Follow& follow) {
  const Pass pass(p, /*training=*/true);
  Communicator& tp = p.mesh.tp();
  p.store.gradients().zero_();
  std::vector<Probe> probes;
  for (const AdaptedLinear* linear : linears_of(p, split)) {
    const Probe& probe = probes.emplace_back(p, *linear);
    torch::autograd::backward({probe.weighted(pass)}, {});
    if (!linear->site().row()) tp.all_reduce(probe.x.grad(), ReduceOp::sum, Purpose::startup);
  }
  tp.all_reduce(p.store.gradients_of(GradientScope::everywhere), ReduceOp::sum, Purpose::startup);

  Slopes slopes(p, /*h=*/1e-3);  // every tensor enters linearly
  for (const Probe& probe : probes) {
    const LinearSite& site = probe.linear->site();
    const auto value = [&] { return probe.weighted(pass).item<double>(); };
    slopes.add(site.name + " x", probe.x.detach(), probe.x.grad(), with_dim(site.in_shard, 1), {kTokens, site.in},
               value);
    for (const auto& parameter : p.store.parameters()) {
      const ParameterSpec& spec = parameter.spec;
      if (spec.name.find(site.name + ".") == std::string::npos) continue;
      slopes.add(spec.name, parameter.master, parameter.gradient, spec.shard, spec.shape, value, [&] { follow(spec); });
    }
  }
  return slopes.worst();
}

/// Collective over tp. AdaLoRA's regulariser by its plain formula (methods 7.2), from full tensors.
inline double regulariser(const Parts& p) {
  double sum = 0;
  int64_t matrices = 0;
  for (const auto& [name, tensor] : p.store.gather(p.store.masters(), p.mesh.tp())) {
    if (name.ends_with(".lora_E")) continue;
    const at::Tensor gram = name.ends_with(".lora_A") ? at::mm(tensor, tensor.t()) : at::mm(tensor.t(), tensor);
    sum += at::linalg_vector_norm(gram - at::eye(gram.size(0), gram.options())).item<double>();
    ++matrices;
  }
  return p.method.config().options.get<AdaLoraConfig>().orth_reg_weight * sum / static_cast<double>(matrices);
}

/// Collective over the mesh; float64. The gradient that `accumulate` leaves against the regulariser's differences.
inline double regulariser_deviation(const Parts& p, Split split, const std::function<void()>& accumulate) {
  p.store.gradients().zero_();
  accumulate();
  const auto value = [&] { return regulariser(p) / p.mesh.tp().size(); };
  const std::string module = linears_of(p, split).front()->name();
  Slopes slopes(p, /*h=*/2e-6);
  for (const char* factor : {".lora_A", ".lora_B"}) {
    const auto& parameter = p.store.at(peft_name(module, factor));
    const ParameterSpec& spec = parameter.spec;
    slopes.add(spec.name, parameter.master, parameter.gradient, spec.shard, spec.shape, value);
  }
  return slopes.worst();
}

/// Collective over the world. The sums of a step, in float64 too.
inline void reduce_gradients(const Parts& p) {
  const auto& everywhere = p.store.gradients_of(GradientScope::everywhere);
  const auto& data = p.store.gradients_of(GradientScope::data);
  p.mesh.world().all_reduce(everywhere, ReduceOp::sum, Purpose::startup);
  p.mesh.dp().all_reduce(data, ReduceOp::sum, Purpose::startup);
}

// ---- training ------------------------------------------------------------------------------------------------------

inline LoaderOptions tiny_batches(const Mesh& mesh) {
  return {{64, true, true, 7}, 4, 1, mesh.dp().rank(), mesh.dp().size()};
}

inline double tiny_rate(const Parts& p) { return p.method.trains_base() ? 1e-3 : 1e-2; }

/// A run on the shipped tokens.
struct TinyRun : TrainingRun {
  TinyRun(const World* world, int tensor, const Combination& c) : TinyRun(world, tensor, c, c.config(), nullptr) {}
  TinyRun(const World* world, int tensor, const Combination& c, const AdapterConfig& config, const SavedAdapter* file)
      : TrainingRun(world, tensor, tiny_model(c.format, at::kFloat), config, {}, 42, file),
        data(repository("configs/tiny/train.h5")),
        batches(data, tiny_batches(mesh)) {}

  /// The next step; its loss.
  double train(int64_t number) { return step(batches.next(), number, tiny_rate(parts_of(*this))).loss; }

  TokenFile data;
  Loader batches;
};

/// Losses of steps 1 to `steps`; `after` each of them.
inline std::vector<double> losses_of(
    TinyRun& run, int64_t steps, const std::function<void()>& after = [] {}) {
  std::vector<double> losses;
  for (int64_t step = 1; step <= steps; ++step) {
    losses.push_back(run.train(step));
    after();
  }
  return losses;
}

/// The largest relative difference of two runs' losses.
inline double loss_deviation(const std::vector<double>& a, const std::vector<double>& b) {
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::abs(a[i] / b[i] - 1));
  return worst;
}

using Weights = std::vector<std::pair<std::string, at::Tensor>>;

/// Copies of the base weights that no parameter trains, as this rank has them.
inline Weights frozen_weights(const Parts& p) {
  std::set<std::string> trained;
  for (const auto& parameter : p.store.parameters()) trained.insert(parameter.spec.name);
  Weights weights;
  const auto add = [&](const std::string& name, const at::Tensor& value) {
    if (!trained.count(name) && !trained.count(peft_name(name, ""))) weights.emplace_back(name, value.clone());
  };
  for (const AdaptedLinear* linear : p.model.linears()) add(linear->name() + ".weight", linear->weight().dense_OI());
  for (const NamedWeight& other : p.model.other_weights()) add(other.name, other.weight->value);
  return weights;
}

/// Collective over tp. Copies of the parameters, in full: a shard of the vocabulary may hold no token of the data.
inline Weights parameters_of(const Parts& p) { return p.store.gather(p.store.masters(), p.mesh.tp()); }

/// Names of those whose bits are the same in both (`equal`), or are not.
inline std::vector<std::string> names_where(bool equal, const Weights& before, const Weights& after) {
  std::vector<std::string> names;
  for (size_t i = 0; i < before.size(); ++i) {
    if (at::equal(before[i].second, after[i].second) == equal) names.push_back(before[i].first);
  }
  return names;
}

/// Collective over tp. What AdaLoRA keeps of the ranks of all modules, in full.
inline at::Tensor kept_ranks(const Parts& p) {
  std::vector<at::Tensor> kept;
  for (const auto& [buffer, flat] : p.method.state()) {
    if (buffer != "kept") continue;
    for (const auto& [name, tensor] : p.store.gather(flat, p.mesh.tp())) {
      if (name.ends_with(".lora_E")) kept.push_back(tensor.flatten());
    }
  }
  return at::cat(kept);
}

}  // namespace corank::test
