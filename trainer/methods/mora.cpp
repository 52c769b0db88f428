#include "trainer/methods/mora.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "data/json_object.h"
#include "trainer/methods/attach.h"
#include "trainer/methods/config_keys.h"
#include "trainer/methods/lora_factors.h"
#include "trainer/methods/merge_config.h"
#include "trainer/methods/methods.h"
#include "trainer/methods/mora_update.h"
#include "trainer/methods/saved_adapter.h"

// MoRA (arXiv 2405.12130; methods 5): one square matrix of about LoRA's size between sums of inputs and repeated
// outputs. It starts at zero and has no scaling. Tensor parallel: the matrix is replicated, its gradient a partial sum.
// ReMoRA: the frozen weight is always made from the model's files and the list of matrices merged so far, so that it
// does not matter when and in how many runs they came.
namespace corank {
namespace {

constexpr const char* kMatrix = ".lora_A.weight";
constexpr const char* kTwin = ".lora_B.weight";  // the authors' program saves the matrix under both names

struct MoraType {
  int64_t number;
  ops::Grouping compress, decompress;
};

constexpr MoraType kMoraTable[] = {
    {1, ops::Grouping::modulo, ops::Grouping::modulo}, {2, ops::Grouping::block, ops::Grouping::block},
    {3, ops::Grouping::block, ops::Grouping::modulo},  {4, ops::Grouping::modulo, ops::Grouping::block},
    {6, ops::Grouping::rotate, ops::Grouping::rotate},
};

const MoraType& mora_type(int64_t number) {
  for (const MoraType& type : kMoraTable) {
    if (type.number == number) return type;
  }
  throw ConfigError(fmt::format("adapter.mora_type: {} is not one of 1, 2, 3, 4, 6", number));
}

/// The matrix that restart k, from 0, left.
std::string merged_name(size_t k) { return fmt::format(".remora_{}", k); }

at::Tensor delta_of(const MoraType& type, const at::Tensor& m_RR, const at::Tensor& w_OI) {
  return ops::mora_delta(m_RR, type.compress, type.decompress, w_OI.size(1), w_OI.size(0));
}

ops::Extent extent(int64_t size, const Shard& shard) {
  return shard.whole() ? ops::Extent{size, 0, size} : ops::Extent{size, shard.start, shard.block};
}

void require_one_range(const LinearSite& site) {
  if (site.out_shard.sections.empty()) return;
  throw ConfigError(fmt::format(
      "adapter.method: mora cannot split {}, because it holds several matrices. Set parallel.tensor to 1.", site.name));
}

class MoraAdapter : public Adapter {
 public:
  MoraAdapter(const LinearSite& site, const MoraType& type, double dropout)
      : in_(extent(site.in, site.in_shard)), out_(extent(site.out, site.out_shard)), type_(&type), dropout_(dropout) {}

  std::shared_ptr<const Update> update(const ops::Dropout& dropout) const override {
    return std::make_shared<MoraUpdate>(
        ops::Mora{m_RR_, type_->compress, type_->decompress, in_, out_, dropout, rotation_});
  }
  double dropout() const override { return dropout_; }
  void set_type(const MoraType& type) { type_ = &type; }

  void add_to(ParameterStore& store, const std::string& module, int64_t side) {
    ParameterSpec spec;
    spec.name = peft_name(module, kMatrix);
    spec.shape = {side, side};
    spec.scope = GradientScope::everywhere;
    spec.bind = [this](const ops::Weight& w) { bind(w); };
    store.add(std::move(spec));
  }

 private:
  void bind(const ops::Weight& m_RR) {
    m_RR_ = m_RR;
    if (type_->compress != ops::Grouping::rotate) return;  // and never will: restarts change between groups
    rotation_ = ops::rotation_of(m_RR.value.size(0), in_.size, out_.size, m_RR.value.options());
  }

  ops::Extent in_, out_;
  const MoraType* type_;
  double dropout_;
  ops::Weight m_RR_;
  ops::Rotation rotation_;
};

const MoraConfig& mora_config(const AdapterConfig& config) { return config.options.get<MoraConfig>(); }

class MoraMethod : public AdapterMethod {
 public:
  explicit MoraMethod(AdapterConfig config)
      : AdapterMethod(std::move(config)),
        own_(mora_config(config_)),
        types_(own_.types.empty() ? std::vector{own_.type} : own_.types) {
    for (const int64_t type : types_) mora_type(type);  // or refuses
  }

  void attach(Model& model, ParameterStore& store, uint64_t /*seed*/) override {
    store_ = &store;
    attach_adapters(model, config_, [&](AdaptedLinear& linear) {
      const LinearSite& site = linear.site();
      require_one_range(site);
      require_exact(linear);
      auto adapter = std::make_unique<MoraAdapter>(site, type_after(0), config_.lora_dropout);
      adapter->add_to(store, site.name, side_of(site.name, site.in, site.out));
      squares_.push_back({&linear, adapter.get(), {}});
      return adapter;
    });
  }

  void begin(const Mesh&) override { apply_merged(); }

  bool on_step_end(int64_t step, const Mesh&) override {
    if (own_.steps == 0 || step % own_.steps != 0) return false;
    for (Square& square : squares_) {
      const at::Tensor& m_RR = master_of(square);
      square.merged_RR.push_back(m_RR.to(at::kCPU, m_RR.scalar_type(), /*non_blocking=*/false, /*copy=*/true));
      m_RR.zero_();
    }
    store_->refresh();
    apply_merged();
    return true;
  }
  int64_t age_of_moments(int64_t step) const override { return own_.steps == 0 ? step : (step - 1) % own_.steps + 1; }
  double learning_rate_scale(int64_t step) const override {
    const int64_t done = age_of_moments(step) - 1;
    if (step == done + 1 || done >= own_.warmup_steps) return 1;  // the schedule warms up at the start
    return static_cast<double>(done) / static_cast<double>(own_.warmup_steps);
  }

  std::vector<std::pair<std::string, at::Tensor>> extra_tensors(Communicator&) const override {
    std::vector<std::pair<std::string, at::Tensor>> extra;
    for (const Square& square : squares_) {
      for (size_t k = 0; k < square.merged_RR.size(); ++k) {
        extra.emplace_back(peft_name(square.linear->name(), merged_name(k)), square.merged_RR[k]);
      }
    }
    return extra;
  }
  void take_extra(std::vector<std::pair<std::string, at::Tensor>>& tensors) override {
    const std::map<std::string, at::Tensor> found(tensors.begin(), tensors.end());
    for (Square& square : squares_) {
      square.merged_RR = merged_of(found, peft_name(square.linear->name(), ""));
      const ParameterSpec& spec = store_->at(peft_name(square.linear->name(), kMatrix)).spec;
      for (const at::Tensor& m_RR : square.merged_RR) require_shape(spec, m_RR);
    }
    std::erase_if(tensors, [](const auto& entry) { return entry.first.find(".remora_") != std::string::npos; });
  }
  GradientSizes gradient_sizes(const LinearSize& linear, int) const override {
    const int64_t side = side_of(linear.name, linear.in, linear.out);
    return {side * side, 0};
  }
  UpdateCost update_cost(const LinearSize& linear, int) const override {
    const int64_t side = side_of(linear.name, linear.in, linear.out);
    const auto blocks = [side](int64_t size) { return (size + side - 1) / side; };
    const bool rotates = type_after(0).compress == ops::Grouping::rotate;
    return {.kept = rotates ? side * std::min(blocks(linear.in), blocks(linear.out)) : side,
            .forward = {.input = 1, .output = 2},
            .backward = {.input = 2, .output = 1}};
  }
  at::Tensor merged(const std::string&, const ModuleTensors& tensors, const at::Tensor& w_OI) const override {
    const std::vector<at::Tensor> before = merged_of(tensors, "");
    return with_merged(w_OI, before) + delta_of(type_after(before.size()), tensors.at(kMatrix), w_OI);
  }
  ModuleParts parts(const std::string&) const override {
    ModuleParts parts{{kMatrix, {-1, -1}}};
    for (int64_t k = 0; k < own_.merges; ++k) parts.push_back({merged_name(k), {-1, -1}});
    return parts;
  }
  std::string beyond_peft() const override {
    if (own_.types.empty()) return "";
    return "a ReMoRA adapter is a list of matrices under several mora_types, for which PEFT and the fork of MoRA's "
           "authors have no form. Use the adapter.h5 as it is, or merge it into its model with corank merge";
  }
  std::string consumers() const override {
    if (!own_.types.empty()) return "only corank loads it.";
    return "only the fork of PEFT by MoRA's authors (kongds/MoRA) loads it; PEFT itself does not know the method.";
  }
  void from_checkpoint(SavedAdapter& file) const override {
    const std::map<std::string, at::Tensor> tensors(file.tensors.begin(), file.tensors.end());
    int64_t& merges = file.config.options.edit<MoraConfig>().merges;
    for (const std::string& module : adapted_modules(file)) {
      merges = std::max(merges, static_cast<int64_t>(merged_of(tensors, peft_name(module, "")).size()));
    }
  }
  void from_peft(SavedAdapter& file) const override {
    const std::map<std::string, at::Tensor> tensors(file.tensors.begin(), file.tensors.end());
    std::erase_if(file.tensors, [&](const auto& entry) {
      if (!entry.first.ends_with(kTwin)) return false;
      const std::string module = entry.first.substr(0, entry.first.size() - std::string(kTwin).size());
      const auto matrix = tensors.find(module + kMatrix);
      if (matrix == tensors.end() || !at::equal(matrix->second, entry.second)) {
        throw InputError(fmt::format("{}: differs from {}{}, but MoRA has one matrix.", entry.first, module, kMatrix));
      }
      return true;
    });
  }
  void to_peft(SavedAdapter& file) const override {
    for (const std::string& module : adapted_modules(file)) {
      const auto a = std::find_if(file.tensors.begin(), file.tensors.end(),
                                  [&](const auto& entry) { return entry.first == peft_name(module, kMatrix); });
      file.tensors.emplace_back(peft_name(module, kTwin), a->second);
    }
  }

 private:
  /// One adapted linear (the model's) with its adapter and the matrices merged into it (CPU).
  struct Square {
    AdaptedLinear* linear;
    MoraAdapter* adapter;
    std::vector<at::Tensor> merged_RR;
  };

  bool groups_by(ops::Grouping grouping) const {
    return std::any_of(types_.begin(), types_.end(), [&](int64_t number) {
      return mora_type(number).compress == grouping || mora_type(number).decompress == grouping;
    });
  }

  /// The number of parameters is LoRA's of rank r, rounded; rotation needs an even side.
  int64_t side_of(const std::string& module, int64_t in, int64_t out) const {
    const auto r = static_cast<double>(config_.rank_of(module));
    auto side = static_cast<int64_t>(std::sqrt(static_cast<double>(in + out) * r) + 0.5);
    if (groups_by(ops::Grouping::rotate)) side -= side % 2;
    if (side > (groups_by(ops::Grouping::block) ? std::min(in, out) : 2 * in)) {
      throw ConfigError(
          fmt::format("adapter.r: rank {} makes MoRA's matrix {} wide, too large for {} with {} inputs and {} outputs "
                      "and mora_type {}. Choose a smaller r.",
                      config_.rank_of(module), side, module, in, out, fmt::join(types_, ", ")));
    }
    return side;
  }

  const MoraType& type_after(size_t restarts) const { return mora_type(types_[restarts % types_.size()]); }
  const at::Tensor& master_of(const Square& square) const {
    return store_->at(peft_name(square.linear->name(), kMatrix)).master;
  }

  /// prefix.remora_0, .remora_1, ...
  static std::vector<at::Tensor> merged_of(const std::map<std::string, at::Tensor>& tensors,
                                           const std::string& prefix) {
    std::vector<at::Tensor> merged;
    for (auto found = tensors.find(prefix + merged_name(0)); found != tensors.end();
         found = tensors.find(prefix + merged_name(merged.size()))) {
      merged.push_back(found->second);
    }
    return merged;
  }

  at::Tensor with_merged(const at::Tensor& w_OI, const std::vector<at::Tensor>& merged_RR) const {
    at::Tensor sum = w_OI;
    for (size_t k = 0; k < merged_RR.size(); ++k) sum = sum + delta_of(type_after(k), merged_RR[k].to(w_OI), w_OI);
    return sum;
  }

  /// Brings frozen weights and types to the merged matrices.
  void apply_merged() {
    for (const Square& square : squares_) {
      if (square.merged_RR.empty()) continue;
      square.linear->rebuild([&](const at::Tensor& w_OI) { return with_merged(w_OI, square.merged_RR); });
      square.adapter->set_type(type_after(square.merged_RR.size()));
    }
  }

  /// A quantised weight would be rounded anew at every restart, by more than many a merged matrix holds.
  void require_exact(const AdaptedLinear& linear) const {
    if (own_.types.empty() || linear.format() == "none") return;
    throw ConfigError(
        fmt::format("adapter.remora_steps: every restart changes the frozen weights, and {} is in {}, which would be "
                    "rounded anew each time. Set model.quantization to none, or leave remora_steps out.",
                    linear.name(), linear.format()));
  }

  MoraConfig own_;
  std::vector<int64_t> types_;  // in turn
  ParameterStore* store_ = nullptr;
  std::vector<Square> squares_;
};

std::string of_restarts(const AdapterConfig& config, const std::string& value) {
  return mora_config(config).steps > 0 ? value : "";
}

class MoraEntry : public MethodEntry {
 public:
  std::string name() const override { return "mora"; }
  std::unique_ptr<AdapterMethod> make(const AdapterConfig& config) const override {
    return std::make_unique<MoraMethod>(config);
  }

  std::vector<std::string> common_keys() const override { return keys_of_adapters({"r", "rank_pattern"}); }
  std::vector<OwnKey> keys() const override {
    using C = const AdapterConfig&;
    return {
        {"mora_type", [](C c) { return mora_config(c).steps ? "" : fmt::format("{}", mora_config(c).type); }},
        {"remora_steps", [](C c) { return of_restarts(c, fmt::format("{}", mora_config(c).steps)); }},
        {"remora_types", [](C c) { return of_restarts(c, fmt::format("{}", mora_config(c).types)); }},
        {"remora_warmup_steps", [](C c) { return of_restarts(c, fmt::format("{}", mora_config(c).warmup_steps)); }}};
  }
  /// Types are kept only where restarts go through them.
  void read(const Section& section, AdapterConfig& config) const override {
    MoraConfig& c = config.options.edit<MoraConfig>();
    c.type = section.get<int64_t>("mora_type", c.type);
    c.steps = section.get<int64_t>("remora_steps", 0);
    c.types = section.get<std::vector<int64_t>>("remora_types", {1, 2});
    c.warmup_steps = section.get<int64_t>("remora_warmup_steps", c.warmup_steps);
    if (c.types.empty()) section.fail("remora_types", "the list is empty");
    for (const char* key : {"remora_types", "remora_warmup_steps"}) {
      if (c.steps == 0 && section.has(key)) section.fail(key, "says how to restart; remora_steps must say when");
    }
    if (c.steps != 0 && section.has("mora_type")) {
      section.fail("mora_type", "contradicts remora_steps: the types are those of remora_types; leave it out");
    }
    if (c.steps == 0) c.types.clear();
    if (!c.types.empty()) c.type = c.types.front();
  }
  void check(const AdapterConfig& config, const Require& require) const override {
    const MoraConfig& c = mora_config(config);
    for (const int64_t one : c.types) {
      require(one >= 1 && one <= 4, "remora_types", one, "one of 1, 2, 3, 4, which have groups to change");
    }
    const auto is_type = [&](const MoraType& one) { return one.number == c.type; };
    require(std::any_of(std::begin(kMoraTable), std::end(kMoraTable), is_type), "mora_type", c.type,
            "one of 1, 2, 3, 4, 6");
    require(c.steps >= 0, "remora_steps", c.steps, "a number of steps");
    if (c.steps == 0) return;
    require(c.warmup_steps >= 0 && c.warmup_steps < c.steps, "remora_warmup_steps", c.warmup_steps,
            "a number of steps below remora_steps; set remora_warmup_steps beside it");
  }
  void check_schedule(const AdapterConfig& config, int64_t total_steps) const override {
    if (mora_config(config).steps <= total_steps) return;
    throw ConfigError(fmt::format(
        "adapter.remora_steps: {} is more than the run's {} steps, so nothing would be merged. Lower it, train longer, "
        "or leave it out.",
        mora_config(config).steps, total_steps));
  }

  std::string peft_switch() const override { return "use_mora"; }
  std::vector<OwnField> fields() const override { return {{"mora_type"}, {"remora_types", /*may_be_null=*/true}}; }
  void read_fields(const JsonObject& file, AdapterConfig& config) const override {
    MoraConfig& c = config.options.edit<MoraConfig>();
    c.type = file.get("mora_type", c.type);
    c.types = file.get("remora_types", c.types);
  }
  void write_fields(const AdapterConfig& config, nlohmann::json& fields) const override {
    fields.update({{peft_switch(), true}, {"mora_type", mora_config(config).type}});
    if (!mora_config(config).types.empty()) fields["remora_types"] = mora_config(config).types;
  }

  /// The file's types and matrices; of the restarts to come what the run file writes.
  void merge(const RunBesideFile& both, AdapterConfig& merged) const override {
    const MoraConfig &run = mora_config(both.run), &file = mora_config(both.file);
    if (run.steps == 0) both.require_same("mora_type", run.type, file.type);
    MoraConfig& c = merged.options.edit<MoraConfig>();
    c.steps = run.steps;
    c.warmup_steps = run.warmup_steps;
    c.merges = run.merges;
    if (!file.types.empty()) {
      both.require_same("remora_types", run.types, file.types);
      return;
    }
    c.types = run.types;  // MoRA so far
    if (run.steps == 0 || run.types.front() == file.type) return;
    throw ConfigError(fmt::format("adapter.remora_types: the run's are {}, {} was trained under {}. Begin with that.",
                                  run.types, both.run.path, file.type));
  }
};

}  // namespace

const MethodEntry& mora_method() {
  static const MoraEntry entry;
  return entry;
}

}  // namespace corank
