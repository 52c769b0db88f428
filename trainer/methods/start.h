#pragma once
#include "trainer/layers/model.h"
#include "trainer/methods/methods.h"
#include "trainer/methods/saved_adapter.h"

namespace corank {

/// The weights that config.modules_to_save names (PEFT's name or the end of it). ConfigError for others.
std::vector<NamedWeight> saved_modules(Model& model, const AdapterConfig& config);

/// Attaches `method` and modules_to_save: all parameters of the run are in `store`, without memory.
void register_parameters(AdapterMethod& method, Model& model, ParameterStore& store, uint64_t seed);

/// check_fits() of what the method does not take for itself. `method` has registered its parameters in `store`.
void check_fits(MethodTraining& method, SavedAdapter adapter, const ParameterStore& store);

/// Collective over the mesh. Brings `method` onto `model`: attaches, allocates the store (masters float32, float64
/// where `dtype` is), initialises, loads `file` if there is one, begins.
void start_method(AdapterMethod& method, Model& model, ParameterStore& store, const Mesh& mesh, at::ScalarType dtype,
                  uint64_t seed, const SavedAdapter* file = nullptr);

}  // namespace corank
