#pragma once
#include <ATen/ATen.h>

#include <string>
#include <utility>
#include <vector>

#include "trainer/adapter/config.h"
#include "trainer/adapter/methods.h"
#include "trainer/adapter/peft_config.h"
#include "trainer/parameters.h"

namespace corank {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

/// An adapter outside a run: its configuration and full tensors under PEFT's names.
struct AdapterFile {
  AdapterConfig config;
  std::string base_model;  ///< base_model_name_or_path, information only
  NamedTensors tensors;
};

/// A PEFT folder, a corank checkpoint folder, or an adapter.h5 file.
AdapterFile read_adapter(const std::string& path);
/// adapter_config.json, adapter_model.safetensors and a model card, each written atomically; the method turns what a
/// checkpoint holds into what PEFT loads. ConfigError where the method has no such form.
void write_peft_folder(const std::string& folder, AdapterFile adapter);
/// The image of adapter.h5.
std::string adapter_h5_image(const AdapterFile& adapter);

/// InputError, naming `origin` and the tensor, unless the tensors are those that the adapter's own config describes,
/// complete and finite.
void check_adapter(const AdapterFile& adapter, const std::string& origin);

/// InputError naming what is missing in the file, unknown to the run (whose parameters need no memory yet) or of
/// another shape.
void check_fits(const AdapterFile& adapter, const ParameterStore& store);
/// Overwrites every parameter of the store with the file's tensor of its name, after check_fits.
void load_tensors(const AdapterFile& adapter, ParameterStore& store);

/// Modules that the tensor names belong to, in order of appearance.
std::vector<std::string> adapted_modules(const AdapterFile& adapter);

/// Embedding and head that stand beside the adapter and not in modules_to_save, by their full names: PEFT
/// saves them along where the vocabulary was resized, or when told to.
std::vector<std::string> saved_along(const AdapterFile& adapter);

/// Those of `module` by the ends of their names, as `options` say.
ModuleTensors module_tensors(const NamedTensors& tensors, const std::string& module, const at::TensorOptions& options);

/// The config of a run that starts from `file`: keys that the run file leaves out come from the file; keys in both must
/// mean the same, else ConfigError naming both. `written` holds the keys of the run's adapter section.
AdapterConfig merge_with_file(const AdapterConfig& run, const std::vector<std::string>& written,
                              const AdapterConfig& file, const std::vector<std::string>& linears);

}  // namespace corank
