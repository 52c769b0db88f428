#include "trainer/methods/saved_adapter.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>

#include "configs/error.h"
#include "trainer/methods/peft_name.h"

namespace corank {
namespace {

/// Embedding and head by the last part of their names, in every family.
constexpr std::string_view kVocabularyModules[] = {"embed_tokens", "wte", "lm_head"};

bool is_of_vocabulary(const std::string& module) {
  const std::string last = module.substr(module.rfind('.') + 1);
  return std::count(std::begin(kVocabularyModules), std::end(kVocabularyModules), last) > 0;
}

bool has_shape(const at::Tensor& tensor, const std::vector<int64_t>& shape) {
  const auto fits = [](int64_t size, int64_t wanted) { return wanted == -1 ? size > 0 : size == wanted; };
  return std::equal(tensor.sizes().begin(), tensor.sizes().end(), shape.begin(), shape.end(), fits);
}

}  // namespace

void check_adapter(const SavedAdapter& adapter, const std::string& origin) {
  std::map<std::string, at::Tensor> tensors(adapter.tensors.begin(), adapter.tensors.end());
  const auto refuse = [&](const std::string& what) {
    throw InputError(fmt::format("{}: {}. The adapter is damaged or not complete; make it again.", origin, what));
  };
  if (tensors.empty()) refuse("holds no tensor");
  for (const auto& [name, tensor] : tensors) {
    if (!at::isfinite(tensor).all().item<bool>()) refuse(fmt::format("tensor {} holds NaN or infinite values", name));
  }
  const std::vector<std::string> modules = adapted_modules(adapter);
  if (modules.empty()) refuse("holds tensors of no adapted module");
  if (const auto other = std::find_if(modules.begin(), modules.end(), is_of_vocabulary); other != modules.end()) {
    throw InputError(
        fmt::format("{}: target_modules: it adapts {}, and corank adapts the linears of the blocks only. Embedding, "
                    "last norm and head can be trained in full (modules_to_save); or merge this adapter with PEFT "
                    "(merge_and_unload) and take the result as the base.",
                    origin, *other));
  }
  const auto method = make_method(adapter.config);
  for (const std::string& module : modules) {
    for (const auto& [suffix, shape] : method->parts(module)) {
      const auto found = tensors.find(kPeftPrefix + module + suffix);
      if (found == tensors.end()) refuse(fmt::format("tensor {}{}{} is missing", kPeftPrefix, module, suffix));
      if (!has_shape(found->second, shape)) {
        refuse(fmt::format("tensor {} has shape [{}], its config asks for [{}] (-1: any)", found->first,
                           fmt::join(found->second.sizes(), ", "), fmt::join(shape, ", ")));
      }
      tensors.erase(found);
    }
  }
  for (const std::string& saved : adapter.config.modules_to_save) {
    if (std::erase_if(tensors, [&](const auto& entry) { return is_of_module(entry.first, saved); }) == 0)
      refuse(fmt::format("the tensor of modules_to_save entry {} is missing", saved));
  }
  for (const std::string& saved : saved_along(adapter))
    std::erase_if(tensors, [&](const auto& entry) { return is_of_module(entry.first, saved); });
  if (tensors.empty()) return;
  throw InputError(fmt::format(
      "{}: tensor {} is none that its config describes here. corank adapts linears of the blocks and trains "
      "embedding, last norm and head in full; an adapter on these, or a copy of anything else, it does not "
      "take. Where the config asks for neither, the adapter is damaged; make it again.",
      origin, tensors.begin()->first));
}

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

std::vector<std::string> saved_along(const SavedAdapter& adapter) {
  const auto& listed = adapter.config.modules_to_save;
  std::vector<std::string> modules;
  for (const auto& entry : adapter.tensors) {
    const std::string module = module_of(entry.first).substr(std::string(kPeftPrefix).size());
    const bool is_listed =
        std::any_of(listed.begin(), listed.end(), [&](const auto& one) { return is_of_module(entry.first, one); });
    if (is_listed || entry.first.find(".lora_") != std::string::npos || !is_of_vocabulary(module)) continue;
    if (std::count(modules.begin(), modules.end(), module) == 0) modules.push_back(module);
  }
  return modules;
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
