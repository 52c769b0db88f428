#include "trainer/layers/model.h"
#include "trainer/methods/methods.h"

// Full fine-tuning: every base weight trains, with float32 masters, gradients and moments sharded like the weights.
namespace corank {
namespace {

class Full : public AdapterMethod {
 public:
  using AdapterMethod::AdapterMethod;
  void attach(Model& model, ParameterStore& store, uint64_t /*seed*/) override {
    for (AdaptedLinear* linear : model.linears()) linear->train_base(store);
    for (const NamedWeight& weight : model.other_weights()) train_weight(weight, weight.name, store);
  }
  Purpose gradient_purpose() const override { return Purpose::weight_gradients; }
  bool trains_base() const override { return true; }
  GradientSizes gradient_sizes(const LinearSize& linear, int tensor) const override {
    GradientSizes sizes{0, linear.in * linear.out / tensor};
    if (linear.bias) (linear.row ? sizes.everywhere : sizes.data) += linear.row ? linear.out : linear.out / tensor;
    return sizes;
  }
  UpdateCost update_cost(const LinearSize&, int) const override { return {}; }
  at::Tensor merged(const std::string&, const ModuleTensors& tensors, const at::Tensor&) const override {
    return tensors.at(".weight");
  }
};

class FullEntry : public MethodEntry {
 public:
  std::string name() const override { return "full"; }
  std::unique_ptr<AdapterMethod> make(const AdapterConfig& config) const override {
    return std::make_unique<Full>(config);
  }
  std::vector<std::string> common_keys() const override { return {}; }
};

}  // namespace

const MethodEntry& full_method() {
  static const FullEntry entry;
  return entry;
}

}  // namespace corank
