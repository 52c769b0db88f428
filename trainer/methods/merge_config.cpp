#include "trainer/methods/merge_config.h"

#include <algorithm>

#include "configs/error.h"
#include "trainer/methods/config_keys.h"
#include "trainer/methods/methods.h"
#include "trainer/methods/targets.h"

namespace corank {
namespace {

/// The same modules in the same order, in full or by the last parts of their names.
bool same_modules(const std::vector<std::string>& a, const std::vector<std::string>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const std::string& one, const std::string& other) {
    return one == other || one.ends_with("." + other) || other.ends_with("." + one);
  });
}

std::vector<std::string> targets_of(const AdapterConfig& config, const ModuleNames& modules) {
  require_only_linears(config, modules.others);
  return select_targets(config, modules.linears);
}

std::vector<std::string> targets_of_file(const AdapterConfig& file, const ModuleNames& modules,
                                         const std::string& path) {
  try {
    return targets_of(file, modules);
  } catch (const ConfigError& error) {  // not the run file's
    throw InputError(path + ": " + error.what());
  }
}

/// Ranks and scalings of the `adapted` modules. Where the run file writes the one value and no pattern, the file's
/// patterns stand beside the same value.
void require_same_ranks(const RunBesideFile& both, const std::vector<std::string>& adapted) {
  const AdapterConfig &run = both.run, &file = both.file;
  const bool same_r = !both.writes("rank_pattern") && run.r == file.r;
  const bool same_alpha = !both.writes("alpha_pattern") && run.lora_alpha == file.lora_alpha;
  const char* rank_key = both.writes("r") ? "r" : "rank_pattern";
  const char* alpha_key = both.writes("lora_alpha") ? "lora_alpha" : "alpha_pattern";
  for (const std::string& module : adapted) {
    if (!same_r) both.require_same(rank_key, run.rank_of(module), file.rank_of(module));
    if (!same_alpha) both.require_same(alpha_key, run.alpha_of(module), file.alpha_of(module));
  }
}

}  // namespace

bool RunBesideFile::writes(const std::string& key) const {
  if (std::count(written.begin(), written.end(), key) == 0) return false;
  const std::vector<AdapterKey> keys = adapter_keys();
  return std::any_of(keys.begin(), keys.end(),
                     [&](const AdapterKey& one) { return one.name == key && one.of(file.method); });
}

void RunBesideFile::refuse(const std::string& key, const std::string& ours, const std::string& theirs) const {
  throw ConfigError(
      fmt::format("adapter.{}: the run file says {}, {} says {}. Leave it out of the run file to take the adapter's.",
                  key, ours, run.path, theirs));
}

AdapterConfig merge_with_file(const AdapterConfig& run, const std::vector<std::string>& written,
                              const AdapterConfig& file, const ModuleNames& modules) {
  const RunBesideFile both{run, written, file};
  const std::vector<std::string> adapted = targets_of_file(file, modules, run.path);
  both.require_same("method", run.method, file.method);
  require_keys_of_method(written, file.method, run.path);
  both.require_same("use_rslora", run.use_rslora, file.use_rslora);
  if (both.writes("target_modules") && targets_of(run, modules) != adapted) {
    throw ConfigError(
        fmt::format("adapter.target_modules: the run file's targets are not those of {} ([{}]). Leave it out of "
                    "the run file to take the adapter's.",
                    run.path, fmt::join(adapted, ", ")));
  }
  if (both.writes("modules_to_save") && !same_modules(run.modules_to_save, file.modules_to_save)) {
    throw ConfigError(fmt::format("adapter.modules_to_save: the run file says [{}], {} says [{}].",
                                  fmt::join(run.modules_to_save, ", "), run.path,
                                  fmt::join(file.modules_to_save, ", ")));
  }
  require_same_ranks(both, adapted);
  AdapterConfig merged = file;
  method_entry(file.method).merge(both, merged);
  merged.path = run.path;
  merged.loraplus_lr_ratio = run.loraplus_lr_ratio;
  merged.lora_dropout = both.writes("lora_dropout") ? run.lora_dropout : file.lora_dropout;
  return merged;
}

}  // namespace corank
