#include "trainer/methods/attach.h"
#include "trainer/methods/config_keys.h"
#include "trainer/methods/lora_factors.h"
#include "trainer/methods/methods.h"

// LoRA (arXiv 2106.09685) and rsLoRA (2312.03732), with PEFT's initialisation and scaling (methods 1.3, 2).
namespace corank {
namespace {

class Lora : public AdapterMethod {
 public:
  using AdapterMethod::AdapterMethod;

  void attach(Model& model, ParameterStore& store, uint64_t seed) override {
    attach_adapters(model, config_, [&](const AdaptedLinear& linear) {
      auto adapter = std::make_unique<LoraAdapter>(config_.lora_dropout);
      adapter->factors.add_to(store, linear.site(), lora_options(config_, linear.site(), seed));
      return adapter;
    });
  }
  GradientSizes gradient_sizes(const LinearSize& linear, int tensor) const override {
    return lora_gradient_sizes(linear, config_.rank_of(linear.name), tensor);
  }
  UpdateCost update_cost(const LinearSize& linear, int) const override {
    return lora_update_cost(config_.rank_of(linear.name));
  }
  std::string beyond_plain_lora() const override {
    if (!config_.modules_to_save.empty()) return "modules_to_save train in full";
    if (!config_.rank_pattern.empty() || !config_.alpha_pattern.empty()) return "ranks or alphas differ by module";
    return config_.use_rslora ? "alpha is divided by the root of the rank (use_rslora)" : "";
  }
  bool has_only_factors() const override { return true; }
  std::optional<PlainFactors> plain_factors(const std::string& module, const ModuleTensors& tensors) const override {
    return PlainFactors{tensors.at(".lora_B.weight") * config_.scaling_of(module), tensors.at(".lora_A.weight")};
  }
  at::Tensor merged(const std::string& module, const ModuleTensors& tensors, const at::Tensor& w_OI) const override {
    return w_OI + at::mm(tensors.at(".lora_B.weight"), tensors.at(".lora_A.weight")) * config_.scaling_of(module);
  }
};

class LoraEntry : public MethodEntry {
 public:
  std::string name() const override { return "lora"; }
  std::unique_ptr<AdapterMethod> make(const AdapterConfig& config) const override {
    return std::make_unique<Lora>(config);
  }
  std::vector<std::string> common_keys() const override {
    return keys_of_adapters({"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"});
  }
};

}  // namespace

const MethodEntry& lora_method() {
  static const LoraEntry entry;
  return entry;
}

}  // namespace corank
