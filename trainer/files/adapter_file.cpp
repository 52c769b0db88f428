#include "trainer/files/adapter_file.h"

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
#include "data/storage.h"
#include "trainer/files/peft_config.h"
#include "trainer/methods/methods.h"
#include "trainer/methods/peft_name.h"

namespace corank {
namespace {

constexpr int64_t kMaxConfigBytes = int64_t{1} << 24;
constexpr const char* kAdapterFormat = "corank-adapter";

/// PEFT's spellings of one tensor -> the name corank uses.
std::string canonical_name(std::string name) {
  if (name.starts_with("_orig_mod.")) name.erase(0, 10);
  if (!name.starts_with(kPeftPrefix)) name.insert(0, kPeftPrefix);
  if (const size_t infix = name.rfind(".default"); infix != std::string::npos) name.erase(infix, 8);
  if (const size_t infix = name.rfind(".modules_to_save"); infix != std::string::npos) name.erase(infix, 16);
  if (name.ends_with(".lora_magnitude_vector.weight")) name.erase(name.size() - 7);
  return name;
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

/// `read`, whose refusals begin with the file's name.
void read_under(const std::string& path, const std::function<void()>& read) {
  try {
    read();
  } catch (const InputError& error) {
    throw InputError(path + ": " + error.what());
  }
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

SavedAdapter read_peft_folder(const std::string& folder) {
  require_weights(folder);
  const std::string config_path = folder + "/adapter_config.json";
  const std::string text = read_file(config_path, kMaxConfigBytes);
  const SafetensorsFile file(folder + "/adapter_model.safetensors");
  std::vector<std::string> names;
  for (const auto& entry : file.tensors()) names.push_back(canonical_name(entry.first));
  SavedAdapter adapter;
  adapter.config = parse_peft_config(text, config_path, adapted_modules(names));
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

bool trains_base(const std::string& method) {
  AdapterConfig config;
  config.method = method;
  return make_method(config)->trains_base();
}

/// Under which method the file's tensors are read.
std::string read_method(const h5::Reader& file) {
  const std::string method = read_text(file, "method");
  const std::vector<std::string> known = method_names();
  if (std::count(known.begin(), known.end(), method) == 0) {
    throw InputError(
        fmt::format("{}: attribute method is {}, not one of {}.", file.origin(), method, fmt::join(known, ", ")));
  }
  if (!trains_base(method)) return method;
  throw InputError(file.origin() +
                   ": holds the weights of a full fine-tuning, not an adapter. Use the run's model folder instead.");
}

SavedAdapter read_h5(const std::string& path) {
  const h5::Reader file(path);
  if (!file.has_attribute("format") || file.attribute_string("format") != kAdapterFormat) {
    throw InputError(path + ": not an adapter file of corank (attribute format is missing or another).");
  }
  const std::string method = read_method(file);
  SavedAdapter adapter;
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

/// modules_to_save by their full names: PEFT takes a short one for every module whose name ends so, "norm" for
/// input_layernorm too.
std::vector<std::string> saved_in_full(const SavedAdapter& adapter) {
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

std::string model_card(const SavedAdapter& adapter) {
  return fmt::format(
      "---\nbase_model: {0}\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- lora\n---\n\n"
      "An adapter for `{0}` (method {1}, rank {2}, alpha {3}), trained with corank: {4}\n\n"
      "    from peft import PeftModel\n    model = PeftModel.from_pretrained(base_model, \"this folder\")\n",
      adapter.base_model, adapter.config.method, adapter.config.r, adapter.config.lora_alpha,
      make_method(adapter.config)->consumers());
}

}  // namespace

SavedAdapter read_adapter(const std::string& path) {
  namespace fs = std::filesystem;
  if (fs::exists(fs::path(path) / "adapter_config.json")) return read_peft_folder(path);
  if (fs::exists(fs::path(path) / "adapter.h5")) return read_h5(path + "/adapter.h5");
  if (fs::is_regular_file(path)) return read_h5(path);
  throw MissingError(
      fmt::format("{}: no adapter here. Name a PEFT folder (adapter_config.json), a checkpoint folder or an "
                  "adapter.h5 file.",
                  path));
}

void write_peft_folder(Storage& storage, const std::string& folder, SavedAdapter adapter) {
  const auto method = make_method(adapter.config);
  if (const std::string beyond = method->beyond_peft(); !beyond.empty()) {
    throw ConfigError(fmt::format("{}: {}.", folder, beyond));
  }
  method->to_peft(adapter);
  adapter.config.modules_to_save = saved_in_full(adapter);
  storage.make_folders(folder);
  auto tensors = adapter.tensors;
  std::sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  storage.write_file(folder + "/adapter_model.safetensors", safetensors_image(tensors));
  storage.write_file(folder + "/README.md", model_card(adapter));
  storage.write_file(folder + "/adapter_config.json",
                     peft_config_json(adapter.config, adapted_modules(adapter), adapter.base_model));
}

std::string adapter_h5_image(const SavedAdapter& adapter) {
  h5::Writer file;
  file.attribute("format", kAdapterFormat);
  file.attribute("version", int64_t{1});
  file.attribute("base_model", adapter.base_model);
  file.attribute("method", adapter.config.method);
  if (!trains_base(adapter.config.method)) {
    file.attribute("adapter_config", peft_config_json(adapter.config, adapted_modules(adapter), adapter.base_model));
  }
  for (const auto& [name, tensor] : adapter.tensors) {
    const bool is_half = tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16;
    file.write(name, is_half ? tensor.to(at::kFloat) : tensor.contiguous());  // exactly: the file has no 16 bits
  }
  return file.finish();
}

}  // namespace corank
