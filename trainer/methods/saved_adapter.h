#pragma once
#include <ATen/ATen.h>

#include <string>
#include <utility>
#include <vector>

#include "trainer/layers/parameters.h"
#include "trainer/methods/exchange.h"

namespace corank {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

/// An adapter outside a run: its configuration and full tensors under PEFT's names.
struct SavedAdapter {
  AdapterConfig config;
  std::string base_model;  ///< base_model_name_or_path, information only
  NamedTensors tensors;
};

/// InputError naming what is missing in the file, unknown to the run (whose parameters need no memory yet) or of
/// another shape.
void check_fits(const SavedAdapter& adapter, const ParameterStore& store);

/// Overwrites every parameter of the store with the file's tensor of its name, after check_fits.
void load_tensors(const SavedAdapter& adapter, ParameterStore& store);

/// Modules that the tensor names belong to, in order of appearance.
std::vector<std::string> adapted_modules(const SavedAdapter& adapter);

/// Those of `module` by the ends of their names, as `options` say.
ModuleTensors module_tensors(const NamedTensors& tensors, const std::string& module, const at::TensorOptions& options);

}  // namespace corank
