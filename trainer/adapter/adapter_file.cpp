#include "trainer/adapter/adapter_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <map>
#include <set>

#include "configs/text.h"
#include "data/file.h"
#include "data/h5.h"
#include "data/json_object.h"
#include "data/safetensors.h"
#include "trainer/adapter/methods.h"

namespace corank {
namespace {

constexpr int64_t kMaxConfigBytes = int64_t{1} << 24;
constexpr const char* kPeftPrefix = "base_model.model.";
constexpr const char* kAdapterFormat = "corank-adapter";
/// Embedding and head by the last part of their names, in every family.
constexpr std::string_view kVocabularyModules[] = {"embed_tokens", "wte", "lm_head"};

std::string module_of(const std::string& tensor) { return tensor.substr(0, tensor.rfind('.')); }

bool is_of_vocabulary(const std::string& module) {
  const std::string last = module.substr(module.rfind('.') + 1);
  return std::count(std::begin(kVocabularyModules), std::end(kVocabularyModules), last) > 0;
}

/// True for base_model.model.<path>.<module>.<parameter>.
bool is_of_module(const std::string& tensor, const std::string& module) {
  return module_of(tensor).ends_with("." + module);
}

/// PEFT's spellings of one tensor -> the name corank uses.
std::string canonical_name(std::string name) {
  if (name.starts_with("_orig_mod.")) name.erase(0, 10);
  if (!name.starts_with(kPeftPrefix)) name.insert(0, kPeftPrefix);
  if (const size_t infix = name.rfind(".default"); infix != std::string::npos) name.erase(infix, 8);
  if (const size_t infix = name.rfind(".modules_to_save"); infix != std::string::npos) name.erase(infix, 16);
  if (name.ends_with(".lora_magnitude_vector.weight")) name.erase(name.size() - 7);
  return name;
}

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

void require_weights(const std::string& folder) {
  namespace fs = std::filesystem;
  if (fs::exists(folder + "/adapter_model.safetensors")) return;
  constexpr const char* kRemedy = "Load it with PEFT and save it again with save_pretrained";
  if (fs::exists(folder + "/adapter_model.bin")) {
    throw InputError(
        fmt::format("{}: holds adapter_model.bin only, a pickle, which can run programs when it is read. {} where you "
                    "trust it, which writes adapter_model.safetensors.",
                    folder, kRemedy));
  }
  if (fs::exists(folder + "/adapter_model.safetensors.index.json")) {
    throw InputError(
        fmt::format("{}: holds its tensors in several files (adapter_model.safetensors.index.json), which are not put "
                    "together. {}, which writes one adapter_model.safetensors.",
                    folder, kRemedy));
  }
}

void require_floating(at::ScalarType dtype, const std::string& tensor, const std::string& file) {
  if (at::isFloatingType(dtype)) return;
  throw InputError(
      fmt::format("{}: tensor {} is of type {}, and those of an adapter are floating-point numbers. It was quantised, "
                  "or is no adapter.",
                  file, tensor, c10::toString(dtype)));
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

/// `read`, whose refusals begin with the file's name.
void read_under(const std::string& path, const std::function<void()>& read) {
  try {
    read();
  } catch (const InputError& error) {
    throw InputError(path + ": " + error.what());
  }
}

std::vector<std::string> modules_of(const std::vector<std::string>& tensors) {
  std::vector<std::string> modules;
  std::set<std::string> seen;
  for (const std::string& name : tensors) {
    const size_t end = name.find(".lora_");
    if (!name.starts_with(kPeftPrefix) || name.find('.', std::string(kPeftPrefix).size() + 1) == std::string::npos)
      throw InputError("not a tensor name of an adapter: " + name);
    if (end == std::string::npos) continue;  // of modules_to_save
    const std::string module = name.substr(std::string(kPeftPrefix).size(), end - std::string(kPeftPrefix).size());
    if (seen.insert(module).second) modules.push_back(module);
  }
  return modules;
}

/// What stands under modules_to_save has to be named there: else PEFT leaves it out.
void require_listed(const std::string& stored, const std::string& name, const AdapterConfig& config,
                    const std::string& file) {
  if (stored.find(".modules_to_save.") == std::string::npos) return;
  const auto& listed = config.modules_to_save;
  if (std::any_of(listed.begin(), listed.end(), [&](const auto& one) { return is_of_module(name, one); })) return;
  throw InputError(fmt::format(
      "{}: holds {}, and modules_to_save of adapter_config.json does not name its module. Name it there, or "
      "remove the tensor.",
      file, stored));
}

/// The file's tensors under corank's names. Of modules_to_save PEFT may leave copies: under two names, and the value
/// before training (original_module), which has no effect.
NamedTensors read_tensors(const SafetensorsFile& file, const AdapterConfig& config) {
  NamedTensors tensors;
  std::map<std::string, at::Tensor> seen;
  for (const auto& [stored, info] : file.tensors()) {
    if (stored.find(".original_module.") != std::string::npos) continue;
    require_floating(info.dtype, stored, file.path());
    const std::string name = canonical_name(stored);
    require_listed(stored, name, config, file.path());
    const at::Tensor tensor = file.read(stored);
    const auto [other, is_new] = seen.emplace(name, tensor);
    if (is_new) {
      tensors.emplace_back(name, tensor);
    } else if (!at::equal(tensor, other->second)) {
      throw InputError(
          fmt::format("{}: holds {} twice, under two spellings and with two values. Remove one.", file.path(), name));
    }
  }
  return tensors;
}

AdapterFile read_peft_folder(const std::string& folder) {
  require_weights(folder);
  const std::string config_path = folder + "/adapter_config.json";
  const std::string text = read_file(config_path, kMaxConfigBytes);
  const SafetensorsFile file(folder + "/adapter_model.safetensors");
  std::vector<std::string> names;
  for (const auto& entry : file.tensors()) names.push_back(canonical_name(entry.first));
  AdapterFile adapter;
  adapter.config = parse_peft_config(text, config_path, modules_of(names));
  const auto base = JsonObject(text, config_path).value("base_model_name_or_path");
  if (base.is_string()) adapter.base_model = base.get<std::string>();
  adapter.tensors = read_tensors(file, adapter.config);
  read_under(file.path(), [&] { make_method(adapter.config)->from_peft(adapter); });
  return adapter;
}

std::string read_text(const h5::Reader& file, const std::string& attribute) {
  std::string text = file.attribute_string(attribute);
  if (!is_utf8(text)) throw InputError(fmt::format("{}: attribute {} is not UTF-8 text.", file.origin(), attribute));
  return text;
}

/// Under which method the file's tensors are read.
std::string read_method(const h5::Reader& file) {
  const std::string method = read_text(file, "method");
  if (method == "full") {
    throw InputError(file.origin() +
                     ": holds the weights of a full fine-tuning, not an adapter. Use the run's model folder instead.");
  }
  const std::vector<std::string> known = method_names();
  if (std::count(known.begin(), known.end(), method) > 0) return method;
  throw InputError(
      fmt::format("{}: attribute method is {}, not one of {}.", file.origin(), method, fmt::join(known, ", ")));
}

AdapterFile read_h5(const std::string& path) {
  const h5::Reader file(path);
  if (!file.has_attribute("format") || file.attribute_string("format") != kAdapterFormat) {
    throw InputError(path + ": not an adapter file of corank (attribute format is missing or another).");
  }
  const std::string method = read_method(file);
  AdapterFile adapter;
  adapter.config = parse_peft_config(file.attribute_string("adapter_config"), path, {});
  adapter.base_model = read_text(file, "base_model");
  for (const std::string& name : file.names()) {
    if (!is_utf8(name)) throw InputError(fmt::format("{}: the name of {} is not UTF-8 text.", path, name));
    require_floating(file.dtype(name), name, path);
    adapter.tensors.emplace_back(name.substr(std::min(name.find_first_not_of('/'), name.size())), file.read(name));
  }
  adapter.config.method = method;
  read_under(path, [&] { make_method(adapter.config)->from_checkpoint(adapter); });
  return adapter;
}

bool has_shape(const at::Tensor& tensor, const std::vector<int64_t>& shape) {
  const auto fits = [](int64_t size, int64_t wanted) { return wanted == -1 ? size > 0 : size == wanted; };
  return std::equal(tensor.sizes().begin(), tensor.sizes().end(), shape.begin(), shape.end(), fits);
}

/// modules_to_save by their full names: PEFT takes a short one for every module whose name ends so, "norm" for
/// input_layernorm too.
std::vector<std::string> saved_in_full(const AdapterFile& adapter) {
  std::vector<std::string> modules;
  for (const std::string& saved : adapter.config.modules_to_save) {
    const auto found = std::find_if(adapter.tensors.begin(), adapter.tensors.end(),
                                    [&](const auto& entry) { return is_of_module(entry.first, saved); });
    if (found == adapter.tensors.end()) {
      throw InputError(fmt::format("modules_to_save names {}, of which there is no tensor.", saved));
    }
    modules.push_back(module_of(found->first).substr(std::string(kPeftPrefix).size()));
  }
  return modules;
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

std::string model_card(const AdapterFile& adapter) {
  return fmt::format(
      "---\nbase_model: {0}\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- lora\n---\n\n"
      "An adapter for `{0}` (method {1}, rank {2}, alpha {3}), trained with corank: {4}\n\n"
      "    from peft import PeftModel\n    model = PeftModel.from_pretrained(base_model, \"this folder\")\n",
      adapter.base_model, adapter.config.method, adapter.config.r, adapter.config.lora_alpha,
      make_method(adapter.config)->consumers());
}

}  // namespace

AdapterFile read_adapter(const std::string& path) {
  namespace fs = std::filesystem;
  if (fs::exists(fs::path(path) / "adapter_config.json")) return read_peft_folder(path);
  if (fs::exists(fs::path(path) / "adapter.h5")) return read_h5(path + "/adapter.h5");
  if (fs::is_regular_file(path)) return read_h5(path);
  throw MissingError(
      fmt::format("{}: no adapter here. Name a PEFT folder (adapter_config.json), a checkpoint folder or an "
                  "adapter.h5 file.",
                  path));
}

void check_adapter(const AdapterFile& adapter, const std::string& origin) {
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

void check_fits(const AdapterFile& adapter, const ParameterStore& store) {
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

void load_tensors(const AdapterFile& adapter, ParameterStore& store) {
  check_fits(adapter, store);
  for (const auto& [name, tensor] : adapter.tensors) store.load(name, tensor);
  store.refresh();
}

std::vector<std::string> adapted_modules(const AdapterFile& adapter) {
  std::vector<std::string> names;
  for (const auto& entry : adapter.tensors) names.push_back(entry.first);
  return modules_of(names);
}

std::vector<std::string> saved_along(const AdapterFile& adapter) {
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

void write_peft_folder(const std::string& folder, AdapterFile adapter) {
  const auto method = make_method(adapter.config);
  if (const std::string beyond = method->beyond_peft(); !beyond.empty()) {
    throw ConfigError(fmt::format("{}: {}.", folder, beyond));
  }
  method->to_peft(adapter);
  adapter.config.modules_to_save = saved_in_full(adapter);
  make_folders(folder);
  auto tensors = adapter.tensors;
  std::sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  write_file_atomically(folder + "/adapter_model.safetensors", safetensors_image(tensors));
  write_file_atomically(folder + "/README.md", model_card(adapter));
  write_file_atomically(folder + "/adapter_config.json",
                        peft_config_json(adapter.config, adapted_modules(adapter), adapter.base_model));
}

std::string adapter_h5_image(const AdapterFile& adapter) {
  h5::Writer file;
  file.attribute("format", kAdapterFormat);
  file.attribute("version", int64_t{1});
  file.attribute("base_model", adapter.base_model);
  file.attribute("method", adapter.config.method);
  if (adapter.config.method != "full") {
    file.attribute("adapter_config", peft_config_json(adapter.config, adapted_modules(adapter), adapter.base_model));
  }
  for (const auto& [name, tensor] : adapter.tensors) {
    const bool is_half = tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16;
    file.write(name, is_half ? tensor.to(at::kFloat) : tensor.contiguous());  // exactly: the file has no 16 bits
  }
  return file.finish();
}

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
