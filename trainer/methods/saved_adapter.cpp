#include "trainer/methods/saved_adapter.h"

#include <fmt/format.h>

#include <map>

#include "configs/error.h"
#include "trainer/methods/peft_name.h"

namespace corank {

void check_fits(const SavedAdapter& adapter, const ParameterStore& store) {
  std::map<std::string, const ParameterSpec*> expected;
  for (const auto& p : store.parameters()) expected.emplace(p.spec.name, &p.spec);
  for (const auto& [name, tensor] : adapter.tensors) {
    const auto found = expected.find(name);
    if (found == expected.end()) {
      throw InputError(
          fmt::format("the adapter holds tensor {}, which the run has no place for. Its targets or its base model "
                      "are not the run's.",
                      name));
    }
    require_shape(*found->second, tensor);
    expected.erase(found);
  }
  if (!expected.empty()) {
    throw InputError(
        fmt::format("the adapter lacks {} tensors of the run, the first is {}. Its targets or its base model are "
                    "not the run's.",
                    expected.size(), expected.begin()->first));
  }
}

void load_tensors(const SavedAdapter& adapter, ParameterStore& store) {
  check_fits(adapter, store);
  for (const auto& [name, tensor] : adapter.tensors) store.load(name, tensor);
  store.refresh();
}

std::vector<std::string> adapted_modules(const SavedAdapter& adapter) {
  std::vector<std::string> names;
  for (const auto& entry : adapter.tensors) names.push_back(entry.first);
  return adapted_modules(names);
}

ModuleTensors module_tensors(const NamedTensors& tensors, const std::string& module, const at::TensorOptions& options) {
  const std::string start = kPeftPrefix + module;
  ModuleTensors found;
  for (const auto& [name, tensor] : tensors) {
    if (name.starts_with(start + ".")) found.emplace(name.substr(start.size()), tensor.to(options));
  }
  return found;
}

}  // namespace corank
