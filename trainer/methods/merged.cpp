#include "trainer/methods/merged.h"

#include "trainer/layers/model.h"
#include "trainer/methods/saved_adapter.h"

namespace corank {

void merge_adapter(Model& model, const MethodExchange& method, const ParameterStore& store, Communicator& tp) {
  const at::AutoGradMode no_grad(false);
  const NamedTensors tensors = store.gather(store.masters(), tp);
  const at::TensorOptions options = store.masters().options();
  for (AdaptedLinear* linear : model.linears()) {
    if (!linear->adapter()) continue;
    const at::Tensor w_OI = linear->gather_weight(tp).to(options);
    linear->merge(method.merged(linear->name(), module_tensors(tensors, linear->name(), options), w_OI));
  }
}

void unmerge_adapter(Model& model, MethodTraining& method, const Mesh& mesh) {
  for (AdaptedLinear* linear : model.linears()) {
    if (linear->is_merged()) linear->rebuild();
  }
  method.begin(mesh);
}

}  // namespace corank
