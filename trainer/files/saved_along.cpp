#include "trainer/files/saved_along.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <optional>

#include "configs/error.h"
#include "data/weight_file.h"
#include "trainer/methods/peft_name.h"

namespace corank {
namespace {

bool is_last_part(const std::string& module, const std::vector<std::string>& names) {
  return std::count(names.begin(), names.end(), module.substr(module.rfind('.') + 1)) > 0;
}

constexpr int64_t kRows = 8192;  // compared at a time: a vocabulary need not be held twice

/// The model's weight under the name that PEFT gives it; a tied head is the embedding.
std::optional<NamedWeight> weight_of(const std::string& tensor, Model& model) {
  const std::vector<NamedWeight> weights = model.other_weights();
  const auto found = std::find_if(weights.begin(), weights.end(),
                                  [&](const NamedWeight& weight) { return peft_name(weight.name, "") == tensor; });
  if (found != weights.end()) return *found;
  const NamedWeight& embedding = weights.front();
  const std::string module = tensor.substr(0, tensor.rfind('.'));
  if (!embedding.saveable && is_last_part(module, family_modules().heads)) return embedding;
  return std::nullopt;
}

bool is_of_base(const at::Tensor& tensor, std::string name, const ModelOptions& options) {
  if (options.path.empty()) return false;  // random weights
  WeightFile file(options.path);
  if (!file.has(name)) name = name.substr(name.find('.') + 1);  // files of a model without its head
  for (int64_t row = 0; row < tensor.size(0); row += kRows) {
    const int64_t count = std::min(kRows, tensor.size(0) - row);
    const at::Tensor ours = file.read_slice(name, 0, row, count).to(options.dtype);
    if (!at::equal(tensor.narrow(0, row, count).to(options.dtype), ours)) return false;
  }
  return true;
}

NamedWeight require_place(const std::string& name, const at::Tensor& tensor, Model& model, const std::string& origin) {
  const auto weight = weight_of(name, model);
  if (!weight) {
    throw InputError(
        fmt::format("{}: holds {}, which the model has not. The adapter is of another model.", origin, name));
  }
  if (tensor.sizes() == at::IntArrayRef(weight->shape)) return *weight;
  throw InputError(
      fmt::format("{}: {} was saved beside the adapter with shape [{}], and the model's is [{}]: its vocabulary was "
                  "resized. Save the base model as it was resized (resize_token_embeddings, save_pretrained) and name "
                  "that folder in model.path.",
                  origin, name, fmt::join(tensor.sizes(), ", "), fmt::join(weight->shape, ", ")));
}

/// True where every tensor of `module` is the base's.
bool changes_nothing(const SavedAdapter& adapter, const std::string& module, Model& model, const ModelOptions& options,
                     const std::string& origin) {
  bool all_equal = true;
  for (const auto& [name, tensor] : adapter.tensors) {
    if (!name.starts_with(peft_name(module, "."))) continue;
    const NamedWeight weight = require_place(name, tensor, model, origin);
    if (is_of_base(tensor, weight.name, options)) continue;
    all_equal = false;
    if (weight.saveable) continue;
    throw InputError(
        fmt::format("{}: {} was saved beside the adapter with other values than the model's, whose embedding and head "
                    "are one tied weight that stays as it is. Save the base model with these values (save_pretrained) "
                    "and name that folder in model.path.",
                    origin, name));
  }
  return all_equal;
}

}  // namespace

bool is_of_vocabulary(const std::string& module) {
  const FamilyModules families = family_modules();
  return is_last_part(module, families.embeddings) || is_last_part(module, families.heads);
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

void place_saved_along(SavedAdapter& adapter, Model& model, const ModelOptions& options, const std::string& origin) {
  for (const std::string& module : saved_along(adapter)) {
    if (changes_nothing(adapter, module, model, options, origin)) {
      std::erase_if(adapter.tensors,
                    [&](const auto& entry) { return entry.first.starts_with(peft_name(module, ".")); });
    } else {
      adapter.config.modules_to_save.push_back(module);
    }
  }
}

}  // namespace corank
