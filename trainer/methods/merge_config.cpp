#include "trainer/methods/merge_config.h"

#include <fmt/format.h>

#include <algorithm>

#include "configs/error.h"

namespace corank {
namespace {

/// The file's ranks; of the schedule what the run file writes.
AdaLoraConfig merge_adalora(const AdaLoraConfig& run, const std::vector<std::string>& written,
                            const AdaLoraConfig& file) {
  AdaLoraConfig merged = file;
  merged.total_step = run.total_step;
  const auto take = [&](const char* key, auto& value, const auto& ours) {
    if (std::count(written.begin(), written.end(), key)) value = ours;
  };
  take("target_r", merged.target_r, run.target_r);
  take("tinit", merged.tinit, run.tinit);
  take("tfinal", merged.tfinal, run.tfinal);
  take("deltaT", merged.deltaT, run.deltaT);
  take("beta1", merged.beta1, run.beta1);
  take("beta2", merged.beta2, run.beta2);
  take("orth_reg_weight", merged.orth_reg_weight, run.orth_reg_weight);
  return merged;
}

/// The file's types and matrices; of the restarts to come what the run file writes.
RemoraConfig merge_remora(const AdapterConfig& run, bool types_written, const AdapterConfig& file) {
  RemoraConfig merged = run.remora;
  const std::string ours = fmt::format("[{}]", fmt::join(run.remora.types, ", "));
  if (file.remora.types.empty()) {  // MoRA so far
    if (run.remora.steps == 0 || run.remora.types.front() == file.mora_type) return merged;
    throw ConfigError(fmt::format("adapter.remora_types: the run's are {}, {} was trained under {}. Begin with that.",
                                  ours, run.path, file.mora_type));
  }
  if (types_written && run.remora.types != file.remora.types) {
    throw ConfigError(fmt::format(
        "adapter.remora_types: the run file says {}, {} says [{}]. Leave it out of the run file to take the "
        "adapter's.",
        ours, run.path, fmt::join(file.remora.types, ", ")));
  }
  merged.types = file.remora.types;
  return merged;
}

/// The same modules in the same order, in full or by the last parts of their names.
bool same_modules(const std::vector<std::string>& a, const std::vector<std::string>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const std::string& one, const std::string& other) {
    return one == other || one.ends_with("." + other) || other.ends_with("." + one);
  });
}

std::vector<std::string> targets_of(const AdapterConfig& file, const std::vector<std::string>& linears,
                                    const std::string& path) {
  try {
    return select_targets(file, linears);
  } catch (const ConfigError& error) {  // not the run file's
    throw InputError(path + ": " + error.what());
  }
}

}  // namespace

AdapterConfig merge_with_file(const AdapterConfig& run, const std::vector<std::string>& written,
                              const AdapterConfig& file, const std::vector<std::string>& linears) {
  // A key that the file's method does not have (r beside AdaLoRA) says nothing of it.
  const auto is_written = [&](const std::string& name) {
    const auto key = std::find_if(adapter_keys().begin(), adapter_keys().end(),
                                  [&](const AdapterKey& one) { return one.name == name; });
    return std::count(written.begin(), written.end(), name) > 0 && key->of(file.method);
  };
  const auto compare = [&](const char* key, const auto& ours, const auto& theirs) {
    if (is_written(key) && ours != theirs) {
      throw ConfigError(
          fmt::format("adapter.{}: the run file says {}, {} says {}. Leave it out of the run file to take the "
                      "adapter's.",
                      key, ours, run.path, theirs));
    }
  };
  const std::vector<std::string> modules = targets_of(file, linears, run.path);
  compare("method", run.method, file.method);
  require_keys_of_method(written, file.method, run.path);
  compare("use_rslora", run.use_rslora, file.use_rslora);
  if (is_written("target_modules") && select_targets(run, linears) != modules) {
    throw ConfigError(
        fmt::format("adapter.target_modules: the run file's targets are not those of {} ([{}]). Leave it out of "
                    "the run file to take the adapter's.",
                    run.path, fmt::join(modules, ", ")));
  }
  if (run.remora.steps == 0) compare("mora_type", run.mora_type, file.mora_type);
  if (is_written("modules_to_save") && !same_modules(run.modules_to_save, file.modules_to_save)) {
    throw ConfigError(fmt::format("adapter.modules_to_save: the run file says [{}], {} says [{}].",
                                  fmt::join(run.modules_to_save, ", "), run.path,
                                  fmt::join(file.modules_to_save, ", ")));
  }
  compare("init_r", run.adalora.init_r, file.adalora.init_r);
  // Where the run file writes the one value and no pattern, the file's patterns stand beside the same value.
  const bool same_r = !is_written("rank_pattern") && run.r == file.r;
  const bool same_alpha = !is_written("alpha_pattern") && run.lora_alpha == file.lora_alpha;
  for (const std::string& module : modules) {
    if (!same_r) compare(is_written("r") ? "r" : "rank_pattern", run.rank_of(module), file.rank_of(module));
    if (!same_alpha)
      compare(is_written("lora_alpha") ? "lora_alpha" : "alpha_pattern", run.alpha_of(module), file.alpha_of(module));
  }
  AdapterConfig merged = file;
  if (file.method == "adalora") merged.adalora = merge_adalora(run.adalora, written, file.adalora);
  if (file.method == "mora") merged.remora = merge_remora(run, is_written("remora_types"), file);
  merged.path = run.path;
  merged.loraplus_lr_ratio = run.loraplus_lr_ratio;
  merged.lora_dropout = is_written("lora_dropout") ? run.lora_dropout : file.lora_dropout;
  return merged;
}

}  // namespace corank
