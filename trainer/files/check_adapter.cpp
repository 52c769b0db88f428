#include "trainer/files/check_adapter.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <functional>
#include <map>

#include "configs/error.h"
#include "trainer/files/saved_along.h"
#include "trainer/methods/methods.h"
#include "trainer/methods/peft_name.h"

namespace corank {
namespace {

bool has_shape(const at::Tensor& tensor, const std::vector<int64_t>& shape) {
  const auto fits = [](int64_t size, int64_t wanted) { return wanted == -1 ? size > 0 : size == wanted; };
  return std::equal(tensor.sizes().begin(), tensor.sizes().end(), shape.begin(), shape.end(), fits);
}

void require_linears(const std::vector<std::string>& modules, const std::string& origin) {
  const auto other = std::find_if(modules.begin(), modules.end(), is_of_vocabulary);
  if (other == modules.end()) return;
  throw InputError(
      fmt::format("{}: target_modules: it adapts {}, and corank adapts the linears of the blocks only. Embedding, "
                  "last norm and head can be trained in full (modules_to_save); or merge this adapter with PEFT "
                  "(merge_and_unload) and take the result as the base.",
                  origin, *other));
}

/// Takes out of `tensors` what the config describes. Calls `refuse`, which throws, where something of it is not there.
void take_parts(const SavedAdapter& adapter, const std::vector<std::string>& modules,
                std::map<std::string, at::Tensor>& tensors, const std::function<void(const std::string&)>& refuse) {
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
  require_linears(modules, origin);
  take_parts(adapter, modules, tensors, refuse);
  if (tensors.empty()) return;
  throw InputError(fmt::format(
      "{}: tensor {} is none that its config describes here. corank adapts linears of the blocks and trains "
      "embedding, last norm and head in full; an adapter on these, or a copy of anything else, it does not "
      "take. Where the config asks for neither, the adapter is damaged; make it again.",
      origin, tensors.begin()->first));
}

}  // namespace corank
