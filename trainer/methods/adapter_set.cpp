#include "trainer/methods/adapter_set.h"

#include <fmt/format.h>

#include <algorithm>

#include "configs/error.h"
#include "trainer/methods/merged.h"
#include "trainer/methods/start.h"

namespace corank {

struct AdapterSet::Loaded {
  std::string name;
  std::unique_ptr<AdapterMethod> method;
  ParameterStore store;
  /// What takes its place in the model, or, while this adapter is in use, what stood there before.
  std::vector<std::pair<AdaptedLinear*, std::unique_ptr<Adapter>>> parts;
  std::vector<std::pair<ops::Weight*, ops::Weight>> saved;
  bool changes_base = false;  ///< ReMoRA: what it merged belongs to it alone

  void exchange() {
    for (auto& [linear, adapter] : parts) adapter = linear->set_adapter(std::move(adapter));
    for (auto& [weight, value] : saved) std::swap(*weight, value);
  }
};

AdapterSet::AdapterSet(Model& model, const Mesh& mesh, at::ScalarType dtype, bool merged)
    : model_(model), mesh_(mesh), dtype_(dtype), merged_(merged) {}

AdapterSet::~AdapterSet() = default;

void AdapterSet::load(const std::string& name, const SavedAdapter& file) {
  const auto good = [](unsigned char c) { return std::isalnum(c) || c == '.' || c == '_' || c == '-'; };
  if (name.empty() || !std::all_of(name.begin(), name.end(), good)) {
    throw ConfigError(fmt::format("'{}' is no name for an adapter: use letters, digits, '.', '_' and '-'.", name));
  }
  if (name == kBase) throw ConfigError("the adapter name 'base' stands for the model without one; choose another.");
  if (find(name)) throw ConfigError(fmt::format("two adapters are named {}; choose another name for one.", name));
  use(kBase);
  auto loaded = std::make_unique<Loaded>();
  loaded->name = name;
  loaded->method = make_method(file.config);
  for (const NamedWeight& saved : saved_modules(model_, file.config)) {
    loaded->saved.emplace_back(saved.weight, *saved.weight);
  }
  start_method(*loaded->method, model_, loaded->store, mesh_, dtype_, 0, &file);
  for (AdaptedLinear* linear : model_.linears()) {
    if (linear->adapter()) loaded->parts.emplace_back(linear, nullptr);
  }
  loaded->exchange();
  loaded->changes_base = restore_base();
  adapters_.push_back(std::move(loaded));
}

bool AdapterSet::restore_base() {
  bool changed = false;
  for (AdaptedLinear* linear : model_.linears()) {
    if (linear->is_original()) continue;
    linear->rebuild();
    changed = true;
  }
  return changed;
}

void AdapterSet::use(const std::string& name) {
  Loaded *before = find(in_use_), *next = find(name);
  if (!next && name != kBase) {
    std::vector<std::string> known = names();
    known.emplace_back(kBase);
    throw ConfigError(fmt::format("no adapter is named '{}'; there are: {}.", name, fmt::join(known, ", ")));
  }
  if (before == next) return;
  if (before) {
    if (merged_) unmerge_adapter(model_, *before->method, mesh_);
    before->exchange();
    restore_base();
  }
  in_use_ = name;
  if (!next) return;
  next->exchange();
  if (next->changes_base) next->method->begin(mesh_);
  if (merged_) merge_adapter(model_, *next->method, next->store, mesh_.tp());
}

std::vector<std::string> AdapterSet::names() const {
  std::vector<std::string> names;
  for (const auto& adapter : adapters_) names.push_back(adapter->name);
  return names;
}

AdapterSet::Loaded* AdapterSet::find(const std::string& name) const {
  const auto found =
      std::find_if(adapters_.begin(), adapters_.end(), [&](const auto& adapter) { return adapter->name == name; });
  return found == adapters_.end() ? nullptr : found->get();
}

}  // namespace corank
