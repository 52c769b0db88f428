#include "trainer/files/merge.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "comm/backends.h"
#include "configs/error.h"
#include "data/file.h"
#include "data/json_object.h"
#include "data/storage.h"
#include "data/strict_json.h"
#include "data/weight_file.h"
#include "trainer/methods/lora_factors.h"
#include "trainer/methods/merged.h"
#include "trainer/methods/start.h"
#include "trainer/models/quantization_config.h"
#include "trainer/weights/bitsandbytes.h"

namespace corank {
namespace {

using nlohmann::ordered_json;

/// Every tensor of the merged model under its name in the files.
class MergedModel {
 public:
  MergedModel(const ModelOptions& options, const SavedAdapter& adapter, bool dequantize)
      : options_(options),
        adapter_(adapter),
        dequantize_(dequantize),
        method_(make_method(adapter.config)),
        file_(options.path),
        holds_nf4_(holds_bitsandbytes_nf4(file_)) {
    if (holds_nf4_ && !dequantize_) {
      throw ConfigError(options.path + ": holds its weights in 4 bits and no others. Merge with --base dequantized.");
    }
    Ledger ledger;
    const auto solo = make_solo_communicator(at::kCPU, ledger);
    const auto model = outline_model(options, *solo);
    const std::string prefix = omitted_prefix(*model);
    const auto in_file = [&](const std::string& name) {
      return name.starts_with(prefix) ? name.substr(prefix.size()) : name;
    };
    for (const AdaptedLinear* linear : model->linears()) {
      linears_.emplace(in_file(linear->name() + ".weight"), linear->site());
    }
    for (const NamedWeight& saved : saved_modules(*model, adapter.config)) {
      saved_.emplace(in_file(saved.name), peft_name(saved.name, ""));
    }
    ParameterStore store;
    register_parameters(*method_, *model, store, 0);
    check_fits(*method_, adapter, store);
    const std::vector<std::string> modules = adapted_modules(adapter);
    adapted_.insert(modules.begin(), modules.end());
  }

  const std::vector<std::unique_ptr<SafetensorsFile>>& files() const { return file_.files(); }
  MergeResult counts() const {
    return {static_cast<int64_t>(adapted_.size()), static_cast<int64_t>(saved_.size()), 0, 0};
  }

  /// What to write in the place of one file: its tensors in their order. Those of more bytes an element come first, so
  /// that all stay aligned; and what bitsandbytes keeps beside its codes is left out.
  std::vector<std::pair<std::string, TensorInfo>> contents(const SafetensorsFile& file) const {
    std::vector<std::pair<std::string, TensorInfo>> result;
    for (const auto& [name, info] : file.tensors()) {
      if (!is_part_of_nf4(name)) result.emplace_back(name, merged_info(name, info));
    }
    std::sort(result.begin(), result.end(),
              [&](const auto& a, const auto& b) { return file.info(a.first).begin < file.info(b.first).begin; });
    std::stable_sort(result.begin(), result.end(), [](const auto& a, const auto& b) {
      return c10::elementSize(a.second.dtype) > c10::elementSize(b.second.dtype);
    });
    return result;
  }

  at::Tensor tensor(const std::string& name, at::ScalarType dtype) {
    const auto linear = linears_.find(name);
    const bool is_adapted = linear != linears_.end() && adapted_.contains(linear->second.name);
    at::Tensor result;
    if (const auto saved = saved_.find(name); saved != saved_.end()) {
      result = saved_value(saved->second).to(dtype);
    } else if (is_adapted || (linear != linears_.end() && dequantize_)) {
      result = weight(name, linear->second, is_adapted, dtype);
    } else {
      return base_values(name);
    }
    if (at::isfinite(result).all().item<bool>()) return result.contiguous();
    throw InputError(
        fmt::format("{}: with the adapter it holds NaN or infinite values in {}. The adapter diverged, or its values "
                    "are too large for this type.",
                    name, c10::toString(dtype)));
  }

 private:
  /// Files of a model without its head leave the first part of every name out.
  std::string omitted_prefix(Model& model) const {
    const std::string embedding = model.other_weights().at(0).name;
    return file_.has(embedding) ? "" : embedding.substr(0, embedding.find('.') + 1);
  }

  bool is_part_of_nf4(const std::string& name) const {
    const std::string middle = ".weight.";
    const size_t end = name.rfind(middle);
    return holds_nf4_ && end != std::string::npos && linears_.contains(name.substr(0, end + middle.size() - 1));
  }

  TensorInfo merged_info(const std::string& name, const TensorInfo& stored) const {
    const auto linear = linears_.find(name);
    if (linear == linears_.end() || !dequantize_) return {stored.dtype, stored.shape};
    const LinearSite& site = linear->second;
    return {options_.dtype, site.fan_in_fan_out ? std::vector{site.in, site.out} : std::vector{site.out, site.in}};
  }

  at::Tensor saved_value(const std::string& name) const {
    return std::find_if(adapter_.tensors.begin(), adapter_.tensors.end(),
                        [&](const auto& entry) { return entry.first == name; })
        ->second;
  }

  /// As the files have it; the model's weights are floating, what transformers keeps beside them may be anything.
  at::Tensor base_values(const std::string& name) {
    at::Tensor values = file_.read(name);
    if (values.is_floating_point()) file_.require_finite(name, values);
    return values;
  }

  /// As the files have it: [in, out] where the family's do.
  at::Tensor weight(const std::string& name, const LinearSite& site, bool is_adapted, at::ScalarType dtype) {
    const at::TensorOptions exact = dtype == at::kDouble ? at::kDouble : at::kFloat;
    at::Tensor w_OI = base(name, site).to(exact);
    if (is_adapted) w_OI = method_->merged(site.name, module_tensors(adapter_.tensors, site.name, exact), w_OI);
    return (site.fan_in_fan_out ? w_OI.t() : w_OI).to(dtype);
  }

  at::Tensor base(const std::string& name, const LinearSite& site) {
    StoredWeight stored;
    stored.name = name;
    stored.read = [&](const Shard&) { return site.fan_in_fan_out ? base_values(name).t() : base_values(name); };
    stored.read_nf4 = [&]() -> std::optional<ops::Nf4> {
      if (!holds_nf4_) return std::nullopt;
      return read_bitsandbytes_nf4(file_, name, {site.out, site.in}, /*outline=*/false);
    };
    if (!dequantize_) return stored.read({});
    const FormatOptions format{options_.quantization, options_.double_quant, options_.dtype, at::kCPU};
    return make_frozen_weight(format, stored, {})->dense_OI();
  }

  const ModelOptions& options_;
  const SavedAdapter& adapter_;
  bool dequantize_;
  std::unique_ptr<AdapterMethod> method_;
  WeightFile file_;
  bool holds_nf4_;
  std::map<std::string, LinearSite> linears_;  // by the name of the weight in the files
  std::map<std::string, std::string> saved_;   // name in the files -> in the adapter
  std::set<std::string> adapted_;
};

/// The index of the base with the merged model's tensors.
std::string merged_index(const std::string& base_index, const std::map<std::string, std::string>& file_of,
                         int64_t bytes) {
  nlohmann::json index = parse_json(read_file(base_index), base_index);
  if (!index["metadata"].is_object()) index["metadata"] = nlohmann::json::object();
  index["metadata"]["total_size"] = bytes;
  index["weight_map"] = file_of;
  return index.dump(2) + "\n";
}

/// Weights that are no longer quantised are ordinary ones of the run's dtype.
std::string merged_config(const ModelOptions& options, bool dequantize) {
  const std::string text = model_config_json(options);
  if (!dequantize) return text;
  ordered_json config = JsonObject(text, options.path + "/config.json").root();
  config.erase("quantization_config");
  config[config.contains("torch_dtype") ? "torch_dtype" : "dtype"] =
      options.dtype == at::kFloat ? "float32" : "bfloat16";
  return config.dump(2) + "\n";
}

}  // namespace

MergeResult write_merged_model(Storage& storage, const std::string& folder, const ModelOptions& options,
                               const SavedAdapter& adapter, bool dequantize) {
  const at::AutoGradMode no_grad(false);
  MergedModel model(options, adapter, dequantize);
  MergeResult result = model.counts();
  std::map<std::string, std::string> file_of;
  for (const auto& file : model.files()) {
    const std::string name = std::filesystem::path(file->path()).filename().string();
    const auto contents = model.contents(*file);
    if (contents.empty()) continue;
    const auto out = storage.create(folder + "/" + name);
    out->write(safetensors_header(contents, file->metadata()));
    for (const auto& [tensor_name, info] : contents) {
      const at::Tensor tensor = model.tensor(tensor_name, info.dtype);
      out->write({static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes()});
      result.bytes += static_cast<int64_t>(tensor.nbytes());
      file_of.emplace(tensor_name, name);
    }
    out->commit();
  }
  result.tensors = static_cast<int64_t>(file_of.size());
  const std::string base_index = options.path + "/" + kWeightIndex;
  if (std::filesystem::exists(base_index)) {
    storage.write_file(folder + "/" + kWeightIndex, merged_index(base_index, file_of, result.bytes));
  }
  copy_companions(storage, options.path, folder);
  storage.write_file(folder + "/config.json", merged_config(options, dequantize));
  return result;
}

}  // namespace corank
