#include "trainer/adapter/methods.h"
#include "trainer/model/model.h"

// Full fine-tuning: every base weight trains, with float32 masters, gradients and moments sharded like the weights.
namespace corank {
namespace {

void train(const NamedWeight& named, ParameterStore& store) {
  ParameterSpec spec;
  spec.name = named.name;
  spec.shape = named.shape;
  spec.shard = named.shard;
  spec.decays = named.decays;
  spec.scope = named.scope;
  spec.initialise = [old = named.weight->value](const at::Tensor& local) { local.copy_(old); };
  spec.bind = [weight = named.weight](const ops::Weight& w) { *weight = w; };
  store.add(std::move(spec));
}

class Full : public AdapterMethod {
 public:
  void attach(Model& model, ParameterStore& store, uint64_t /*seed*/) override {
    for (AdaptedLinear* linear : model.linears()) linear->train_base(store);
    for (const NamedWeight& weight : model.other_weights()) train(weight, store);
  }
  Purpose gradient_purpose() const override { return Purpose::weight_gradients; }
  bool trains_base() const override { return true; }
};

}  // namespace

std::unique_ptr<AdapterMethod> make_full(const AdapterConfig&) { return std::make_unique<Full>(); }

}  // namespace corank
