#include "trainer/methods/start.h"

#include <fmt/format.h>

#include <algorithm>

#include "configs/error.h"
#include "trainer/layers/model.h"
#include "trainer/methods/lora_factors.h"
#include "trainer/methods/targets.h"

namespace corank {
namespace {

/// LoRA+ as PEFT groups parameters (methods 2.3): B, and every tensor of one dimension.
double loraplus_scale(const ParameterSpec& spec, double ratio) {
  return spec.shape.size() == 1 || spec.name.find("lora_B") != std::string::npos ? ratio : 1;
}

/// Modules of the weights that can be trained in full.
std::vector<std::string> saveable(const std::vector<NamedWeight>& weights) {
  std::vector<std::string> modules;
  for (const NamedWeight& weight : weights) {
    const std::string module = weight.name.substr(0, weight.name.rfind('.'));
    if (weight.saveable && std::count(modules.begin(), modules.end(), module) == 0) modules.push_back(module);
  }
  return modules.empty() ? std::vector<std::string>{"none"} : modules;
}

}  // namespace

std::vector<NamedWeight> saved_modules(Model& model, const AdapterConfig& config) {
  std::vector<NamedWeight> saved, others = model.other_weights();
  for (const std::string& wanted : config.modules_to_save) {
    const auto found = std::stable_partition(others.begin(), others.end(), [&](const NamedWeight& weight) {
      const std::string module = weight.name.substr(0, weight.name.rfind('.'));
      return !weight.saveable || (module != wanted && !module.ends_with("." + wanted));
    });
    if (found == others.end()) {
      const std::string what = fmt::format(
          "modules_to_save: {} is not one that this model can train in full beside an adapter: embedding and head "
          "unless "
          "they are one tied weight, and the last norm. Left to choose from: {}.",
          wanted, fmt::join(saveable(others), ", "));
      if (!config.path.empty()) throw InputError(config.path + ": " + what);
      throw ConfigError("adapter." + what);
    }
    saved.insert(saved.end(), found, others.end());  // weight and, in a LayerNorm, bias
    others.erase(found, others.end());
  }
  return saved;
}

void register_parameters(AdapterMethod& method, Model& model, ParameterStore& store, uint64_t seed) {
  require_only_linears(method.config(), model.other_modules());
  method.attach(model, store, seed);
  for (const NamedWeight& named : saved_modules(model, method.config())) {
    train_weight(named, peft_name(named.name, ""), store);
  }
}

void check_fits(MethodTraining& method, SavedAdapter adapter, const ParameterStore& store) {
  method.take_extra(adapter.tensors);
  check_fits(adapter, store);
}

void start_method(AdapterMethod& method, Model& model, ParameterStore& store, const Mesh& mesh, at::ScalarType dtype,
                  uint64_t seed, const SavedAdapter* file) {
  register_parameters(method, model, store, seed);
  store.scale_learning_rates(
      [&](const ParameterSpec& spec) { return loraplus_scale(spec, method.config().loraplus_lr_ratio); });
  store.allocate(mesh.device(), dtype == at::kDouble ? at::kDouble : at::kFloat, dtype);
  method.initialise(mesh);
  store.refresh();
  if (file) {
    SavedAdapter parameters = *file;
    method.take_extra(parameters.tensors);
    load_tensors(parameters, store);
  }
  method.begin(mesh);
}

}  // namespace corank
