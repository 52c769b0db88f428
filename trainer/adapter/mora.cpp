#include "trainer/ops/mora.h"

#include <fmt/format.h>

#include <cmath>

#include "configs/error.h"
#include "trainer/adapter/adapter_file.h"
#include "trainer/adapter/attach.h"
#include "trainer/adapter/lora_factors.h"
#include "trainer/adapter/methods.h"

// MoRA (arXiv 2405.12130; methods 5): one square matrix of about LoRA's size between sums of inputs and repeated
// outputs. It starts at zero and has no scaling. Tensor parallel: the matrix is replicated, its gradient a partial sum.
namespace corank {
namespace {

constexpr const char* kMatrix = ".lora_A.weight";
constexpr const char* kTwin = ".lora_B.weight";  // the authors' program saves the matrix under both names

struct MoraType {
  int64_t number;
  ops::Grouping compress, decompress;
};

constexpr MoraType kTypes[] = {
    {1, ops::Grouping::modulo, ops::Grouping::modulo}, {2, ops::Grouping::block, ops::Grouping::block},
    {3, ops::Grouping::block, ops::Grouping::modulo},  {4, ops::Grouping::modulo, ops::Grouping::block},
    {6, ops::Grouping::rotate, ops::Grouping::rotate},
};

const MoraType& type_of(const AdapterConfig& config) {
  for (const MoraType& type : kTypes) {
    if (type.number == config.mora_type) return type;
  }
  throw ConfigError(fmt::format("adapter.mora_type: {} is not one of 1, 2, 3, 4, 6", config.mora_type));
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
      : in_(extent(site.in, site.in_shard)), out_(extent(site.out, site.out_shard)), type_(type), dropout_(dropout) {}

  std::shared_ptr<const ops::Update> update(const ops::Dropout& dropout) const override {
    return std::make_shared<ops::MoraUpdate>(
        ops::Mora{m_RR_, type_.compress, type_.decompress, in_, out_, dropout, rotation_});
  }
  double dropout() const override { return dropout_; }

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
    if (type_.compress != ops::Grouping::rotate) return;
    rotation_ = ops::rotation_of(m_RR.value.size(0), in_.size, out_.size, m_RR.value.options().requires_grad(false));
  }

  ops::Extent in_, out_;
  const MoraType& type_;
  double dropout_;
  ops::Weight m_RR_;
  ops::Rotation rotation_;
};

class Mora : public AdapterMethod {
 public:
  explicit Mora(AdapterConfig config) : AdapterMethod(std::move(config)), type_(type_of(config_)) {}

  void attach(Model& model, ParameterStore& store, uint64_t /*seed*/) override {
    attach_adapters(model, config_, [&](const AdaptedLinear& linear) {
      const LinearSite& site = linear.site();
      require_one_range(site);
      auto adapter = std::make_unique<MoraAdapter>(site, type_, config_.lora_dropout);
      adapter->add_to(store, site.name, side_of(site.name, site.in, site.out));
      return adapter;
    });
  }
  GradientSizes gradient_sizes(const LinearSize& linear, int) const override {
    const int64_t side = side_of(linear.name, linear.in, linear.out);
    return {side * side, 0};
  }
  at::Tensor merged(const std::string&, const ModuleTensors& tensors, const at::Tensor& w_OI) const override {
    return w_OI + ops::mora_delta(tensors.at(kMatrix), type_.compress, type_.decompress, w_OI.size(1), w_OI.size(0));
  }
  ModuleParts parts(const std::string&) const override { return {{kMatrix, {-1, -1}}}; }
  std::string consumers() const override {
    return "only the fork of PEFT by MoRA's authors (kongds/MoRA) loads it; PEFT itself does not know the method.";
  }
  void from_peft(AdapterFile& file) const override {
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
  void to_peft(AdapterFile& file) const override {
    for (const std::string& module : adapted_modules(file)) {
      const auto a = std::find_if(file.tensors.begin(), file.tensors.end(),
                                  [&](const auto& entry) { return entry.first == peft_name(module, kMatrix); });
      file.tensors.emplace_back(peft_name(module, kTwin), a->second);
    }
  }

 private:
  /// The number of parameters is LoRA's of rank r, rounded; rotation needs an even side.
  int64_t side_of(const std::string& module, int64_t in, int64_t out) const {
    const auto r = static_cast<double>(config_.rank_of(module));
    auto side = static_cast<int64_t>(std::sqrt(static_cast<double>(in + out) * r) + 0.5);
    if (type_.compress == ops::Grouping::rotate) side -= side % 2;
    const bool by_blocks = type_.compress == ops::Grouping::block || type_.decompress == ops::Grouping::block;
    if (side > (by_blocks ? std::min(in, out) : 2 * in)) {
      throw ConfigError(
          fmt::format("adapter.r: rank {} makes MoRA's matrix {} wide, too large for {} with {} inputs and {} outputs "
                      "and mora_type {}. Choose a smaller r.",
                      config_.rank_of(module), side, module, in, out, config_.mora_type));
    }
    return side;
  }

  const MoraType& type_;
};

}  // namespace

std::unique_ptr<AdapterMethod> make_mora(const AdapterConfig& config) { return std::make_unique<Mora>(config); }

}  // namespace corank
