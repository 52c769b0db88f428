#include "trainer/adapter/merged.h"

#include "trainer/adapter/lora_factors.h"
#include "trainer/model/model.h"

namespace corank {

ModuleTensors tensors_of(const NamedTensors& tensors, const std::string& module, const at::TensorOptions& options) {
  const std::string prefix = peft_name(module, "");
  ModuleTensors found;
  for (const auto& [name, tensor] : tensors) {
    if (name.starts_with(prefix + ".")) found.emplace(name.substr(prefix.size()), tensor.to(options));
  }
  return found;
}

void merge_adapter(Model& model, const AdapterMethod& method, const ParameterStore& store, Communicator& tp) {
  const at::AutoGradMode no_grad(false);
  const NamedTensors tensors = store.gather(store.masters(), tp);
  const at::TensorOptions options = store.masters().options();
  for (AdaptedLinear* linear : model.linears()) {
    if (!linear->adapter()) continue;
    const at::Tensor w_OI = linear->gather_weight(tp).to(options);
    linear->merge(method.merged(linear->name(), tensors_of(tensors, linear->name(), options), w_OI));
  }
}

void unmerge_adapter(Model& model, AdapterMethod& method, const Mesh& mesh) {
  for (AdaptedLinear* linear : model.linears()) {
    if (linear->is_merged()) linear->rebuild();
  }
  method.begin(mesh);
}

}  // namespace corank
