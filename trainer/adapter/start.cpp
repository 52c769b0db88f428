#include "trainer/adapter/start.h"

namespace corank {

void start_method(AdapterMethod& method, Model& model, ParameterStore& store, const Mesh& mesh, at::ScalarType dtype,
                  uint64_t seed, const AdapterFile* file) {
  method.attach(model, store, seed);
  store.allocate(mesh.device(), dtype == at::kDouble ? at::kDouble : at::kFloat, dtype);
  method.initialise(mesh);
  store.refresh();
  if (file) load_tensors(*file, store);
  method.begin(mesh);
}

}  // namespace corank
