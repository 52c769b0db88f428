#include "trainer/files/combine.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "configs/error.h"
#include "trainer/files/plain_lora.h"
#include "trainer/files/saved_along.h"
#include "trainer/methods/methods.h"
#include "trainer/methods/peft_name.h"
#include "trainer/ops/svd.h"

namespace corank {
namespace {

/// One adapter's part of one module.
struct Part {
  const std::string* origin;
  double factor;  ///< weight times scaling
  at::Tensor a_RI, b_OR;
};

struct Parts {
  std::string module;
  std::vector<Part> list;
};

PlainFactors added(const Parts& parts, int64_t /*rank*/) {
  PlainFactors sum;
  for (const Part& part : parts.list) {
    const double root = std::sqrt(std::abs(part.factor));
    const at::Tensor a_RI = part.a_RI * std::copysign(root, part.factor), b_OR = part.b_OR * root;
    if (sum.a_RI.defined() && a_RI.size(0) != sum.a_RI.size(0)) {
      throw ConfigError(
          fmt::format("--how linear: {} has rank {} in {} and {} in {}, and only equal ranks can be added. Take --how "
                      "cat or svd.",
                      parts.module, sum.a_RI.size(0), *parts.list[0].origin, a_RI.size(0), *part.origin));
    }
    sum = sum.a_RI.defined() ? PlainFactors{sum.b_OR + b_OR, sum.a_RI + a_RI} : PlainFactors{b_OR, a_RI};
  }
  return sum;
}

PlainFactors stacked(const Parts& parts, int64_t /*rank*/) {
  std::vector<at::Tensor> a, b;
  for (const Part& part : parts.list) {
    a.push_back(part.a_RI * part.factor);
    b.push_back(part.b_OR);
  }
  return {at::cat(b, 1), at::cat(a, 0)};
}

PlainFactors cut(const Parts& parts, int64_t rank) {
  const PlainFactors exact = stacked(parts, rank);
  const ops::SingularPart part = ops::product_svd(exact.b_OR, exact.a_RI, rank);
  return {part.u_OR * part.s_R, part.v_IR.t()};
}

int64_t largest(const std::vector<int64_t>& ranks) { return *std::max_element(ranks.begin(), ranks.end()); }
int64_t total(const std::vector<int64_t>& ranks) { return std::accumulate(ranks.begin(), ranks.end(), int64_t{0}); }

struct Combination {
  const char* name;
  PlainFactors (*combine)(const Parts& parts, int64_t rank);
  int64_t (*rank)(const std::vector<int64_t>& ranks);  ///< of the result, from the adapters' largest
  bool takes_rank;
};

constexpr Combination kCombinations[] = {
    {"linear", added, largest, false},
    {"cat", stacked, total, false},
    {"svd", cut, largest, true},
};

const Combination& combination(const std::string& name) {
  for (const Combination& one : kCombinations) {
    if (name == one.name) return one;
  }
  throw ConfigError(fmt::format("--how: '{}' is not one of {}", name, fmt::join(combination_names(), ", ")));
}

void require_only_factors(const WeightedAdapter& adapter) {
  const AdapterConfig& c = adapter.file.config;
  if (!c.modules_to_save.empty()) {
    throw ConfigError(
        fmt::format("{}: holds {} in full (modules_to_save), and full weights cannot be added to a base. Merge it into "
                    "the model, or train it without.",
                    adapter.origin, fmt::join(c.modules_to_save, ", ")));
  }
  if (const std::vector<std::string> along = saved_along(adapter.file); !along.empty()) {
    throw ConfigError(fmt::format(
        "{}: holds {} beside its factors, and full weights cannot be added to a base. Make one without them "
        "first: corank export --as plain-lora --base MODEL_DIR, which leaves out what is the model's.",
        adapter.origin, fmt::join(along, ", ")));
  }
  if (!make_method(c)->has_only_factors()) {
    throw ConfigError(
        fmt::format("{}: its method is {}, and only LoRA adapters (rsLoRA and PiSSA too) can be combined. Make one of "
                    "it first: corank export --as plain-lora.",
                    adapter.origin, c.method));
  }
}

int64_t rank_of(const SavedAdapter& file) {
  int64_t rank = 0;
  for (const std::string& module : adapted_modules(file)) rank = std::max(rank, file.config.rank_of(module));
  return rank;
}

void add_part(Parts& parts, const WeightedAdapter& adapter) {
  const ModuleTensors tensors = module_tensors(adapter.file.tensors, parts.module, at::kDouble);
  Part part{&adapter.origin, adapter.weight * adapter.file.config.scaling_of(parts.module),
            tensors.at(".lora_A.weight"), tensors.at(".lora_B.weight")};
  if (!parts.list.empty()) {
    const Part& first = parts.list[0];
    if (part.a_RI.size(1) != first.a_RI.size(1) || part.b_OR.size(0) != first.b_OR.size(0)) {
      throw InputError(fmt::format("{} is [{}, {}] for {} and [{}, {}] for {}. They are adapters of different models.",
                                   parts.module, first.b_OR.size(0), first.a_RI.size(1), *first.origin,
                                   part.b_OR.size(0), part.a_RI.size(1), adapter.origin));
    }
  }
  parts.list.push_back(std::move(part));
}

/// What stands before the number of the block: model.layers., transformer.h.
std::string stem_of(const std::string& module) { return module.substr(0, module.find_first_of("0123456789")); }

void require_float32(const std::pair<std::string, PlainFactors>& module) {
  for (const at::Tensor& factor : {module.second.a_RI, module.second.b_OR}) {
    if (at::isfinite(factor.to(at::kFloat)).all().item<bool>()) continue;
    throw ConfigError(
        fmt::format("--weights: {} becomes larger than float32 can hold. Choose smaller weights.", module.first));
  }
}

/// Every module of every adapter, in order of appearance.
std::vector<Parts> parts_of(const std::vector<WeightedAdapter>& adapters) {
  std::vector<Parts> all;
  for (const WeightedAdapter& adapter : adapters) {
    for (const std::string& module : adapted_modules(adapter.file)) {
      if (!all.empty() && stem_of(module) != stem_of(all[0].module)) {
        throw InputError(fmt::format("{} is of {} and {} of {}. They are adapters of different models.", all[0].module,
                                     *all[0].list[0].origin, module, adapter.origin));
      }
      auto found = std::find_if(all.begin(), all.end(), [&](const Parts& parts) { return parts.module == module; });
      if (found == all.end()) found = all.insert(all.end(), Parts{module, {}});
      add_part(*found, adapter);
    }
  }
  return all;
}

/// Lists of names united; of anything else the modules are named in full.
ModulePattern united_targets(const std::vector<WeightedAdapter>& adapters) {
  ModulePattern united;
  for (const WeightedAdapter& adapter : adapters) {
    const AdapterConfig& c = adapter.file.config;
    if (c.all_linear || c.target_modules.names.empty() || !c.exclude_modules.empty()) return {};
    const auto& names = c.target_modules.names;
    united.names.insert(united.names.end(), names.begin(), names.end());
  }
  return united;
}

}  // namespace

std::vector<std::string> combination_names() {
  std::vector<std::string> names;
  for (const Combination& one : kCombinations) names.emplace_back(one.name);
  return names;
}

SavedAdapter combine(const std::vector<WeightedAdapter>& adapters, const std::string& how,
                     std::optional<int64_t> rank) {
  const Combination& way = combination(how);
  if (rank && !way.takes_rank) {
    throw ConfigError(fmt::format("--r: the rank of --how {} follows from the adapters. Leave --r out.", how));
  }
  std::vector<int64_t> ranks;
  for (const WeightedAdapter& adapter : adapters) {
    require_only_factors(adapter);
    ranks.push_back(rank_of(adapter.file));
  }
  const int64_t r = rank.value_or(way.rank(ranks));
  std::vector<std::pair<std::string, PlainFactors>> modules;
  for (const Parts& parts : parts_of(adapters)) {
    modules.emplace_back(parts.module, way.combine(parts, r));
    require_float32(modules.back());
  }
  SavedAdapter result = plain_lora(adapters[0].file, modules, r);
  result.config.all_linear = false;
  result.config.target_modules = united_targets(adapters);
  result.config.exclude_modules = {};
  return result;
}

}  // namespace corank
