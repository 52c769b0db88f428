#include "trainer/files/plain_lora.h"

#include <fmt/format.h>

#include <algorithm>

#include "configs/error.h"
#include "trainer/files/saved_along.h"
#include "trainer/methods/methods.h"
#include "trainer/methods/peft_name.h"
#include "trainer/ops/svd.h"

namespace corank {
namespace {

using Modules = std::vector<std::pair<std::string, PlainFactors>>;

double size_of(const at::Tensor& m) { return at::linalg_vector_norm(m).item<double>(); }

/// `dim` of the float32 result has `size` indices; the new ones hold zeros.
at::Tensor zero_padded(const at::Tensor& m, int64_t dim, int64_t size) {
  std::vector<int64_t> shape = m.sizes().vec();
  shape[dim] = size;
  at::Tensor result = at::zeros(shape, at::TensorOptions(at::kFloat));
  result.narrow(dim, 0, m.size(dim)).copy_(m);
  return result;
}

/// Cuts updates to one rank and keeps account of what that loses.
class Decomposition {
 public:
  Decomposition(int64_t rank, double max_error) : rank_(rank), max_error_(max_error) {}

  PlainFactors cut(const std::string& module, const at::Tensor& update_OI) {
    const int64_t all = std::min(update_OI.size(0), update_OI.size(1)), kept = std::min(rank_, all);
    const ops::SingularPart part = ops::leading_svd(update_OI, all);
    const at::Tensor b_OR = (part.u_OR * part.s_R).narrow(1, 0, kept).to(at::kFloat);
    const at::Tensor a_RI = part.v_IR.narrow(1, 0, kept).t().to(at::kFloat);
    const double size = size_of(update_OI),
                 lost = size_of(update_OI - at::mm(b_OR.to(at::kDouble), a_RI.to(at::kDouble)));
    errors_.emplace_back(module, size > 0 ? lost / size : 0);
    needed_ = std::max(needed_, sufficient_rank(part.s_R, size));
    return {b_OR, a_RI};
  }

  std::vector<std::pair<std::string, double>> errors() const {
    if (errors_.empty()) return {};
    const auto worst = std::max_element(errors_.begin(), errors_.end(),
                                        [](const auto& a, const auto& b) { return a.second < b.second; });
    if (worst->second <= max_error_) return errors_;
    throw InputError(
        fmt::format("--max-error: rank {} leaves {:.4g} of the update of {}, more than {}. Rank {} is enough for every "
                    "module (--r {}); or allow a larger --max-error.",
                    rank_, worst->second, worst->first, max_error_, needed_, needed_));
  }

 private:
  /// How many singular values leave no more than max_error.
  int64_t sufficient_rank(const at::Tensor& s_R, double size) const {
    const at::Tensor tails_R = s_R.square().flip(0).cumsum(0).flip(0).sqrt();  // [k]: what rank k leaves
    return (tails_R > max_error_ * size).sum().item<int64_t>();
  }

  int64_t rank_;
  double max_error_;
  std::vector<std::pair<std::string, double>> errors_;
  int64_t needed_ = 1;
};

int64_t largest_rank(const SavedAdapter& adapter) {
  int64_t rank = 0;
  for (const std::string& module : adapted_modules(adapter)) rank = std::max(rank, adapter.config.rank_of(module));
  return rank;
}

/// Merged weight less base weight.
at::Tensor update_of(const MethodExchange& method, const std::string& module, const ModuleTensors& tensors,
                     const BaseWeights& base) {
  if (!base) {
    throw ConfigError(
        fmt::format("--base: an adapter of method {} becomes plain LoRA only beside the weights that it changes. Name "
                    "the folder of its base model.",
                    method.config().method));
  }
  const at::Tensor w_OI = base(module).to(at::kDouble);
  return method.merged(module, tensors, w_OI) - w_OI;
}

void require_no_saved_modules(const SavedAdapter& adapter) {
  const AdapterConfig& config = adapter.config;
  if (const std::vector<std::string> along = saved_along(adapter); !along.empty()) {
    throw ConfigError(
        fmt::format("--as plain-lora: the adapter holds {} beside its factors, which plain LoRA has no place for. Name "
                    "the folder of its base model with --base: what is there already is left out.",
                    fmt::join(along, ", ")));
  }
  if (config.modules_to_save.empty()) return;
  throw ConfigError(
      fmt::format("--as plain-lora: the adapter holds {} in full (modules_to_save), which plain LoRA has no place for. "
                  "Export it --as peft, or merge it into the model.",
                  fmt::join(config.modules_to_save, ", ")));
}

void require_exact(const std::string& method, const PlainLoraOptions& options) {
  if (!options.rank) return;
  throw ConfigError(fmt::format(
      "--r: an adapter of method {} becomes plain LoRA exactly, and has its rank by itself. Leave --r out.", method));
}

}  // namespace

SavedAdapter plain_lora(const SavedAdapter& like, const Modules& modules, int64_t rank) {
  SavedAdapter result{like.config, like.base_model, {}};
  AdapterConfig& c = result.config;
  c.method = "lora";
  c.r = rank;
  c.lora_alpha = static_cast<double>(rank);
  c.use_rslora = false;
  c.rank_pattern.clear();
  c.alpha_pattern.clear();
  c.options = {};
  for (const auto& [module, factors] : modules) {
    result.tensors.emplace_back(peft_name(module, ".lora_A.weight"), zero_padded(factors.a_RI, 0, rank));
    result.tensors.emplace_back(peft_name(module, ".lora_B.weight"), zero_padded(factors.b_OR, 1, rank));
  }
  return result;
}

PlainLora to_plain_lora(const SavedAdapter& adapter, const PlainLoraOptions& options) {
  require_no_saved_modules(adapter);
  const auto method = make_method(adapter.config);
  if (method->beyond_plain_lora().empty()) {
    require_exact(adapter.config.method, options);
    return {adapter, {}};
  }
  Decomposition decomposition(options.rank.value_or(2 * largest_rank(adapter)), options.max_error);
  Modules modules;
  int64_t rank = 0;
  for (const std::string& module : adapted_modules(adapter)) {
    const ModuleTensors tensors = module_tensors(adapter.tensors, module, at::kDouble);
    std::optional<PlainFactors> factors = method->plain_factors(module, tensors);
    if (!factors) factors = decomposition.cut(module, update_of(*method, module, tensors, options.base));
    rank = std::max(rank, factors->a_RI.size(0));
    if (factors->a_RI.size(0) > 0) modules.emplace_back(module, *std::move(factors));
  }
  if (modules.empty()) throw InputError("--as plain-lora: the adapter's update is zero everywhere; nothing is left.");
  PlainLora result{plain_lora(adapter, modules, rank), decomposition.errors()};
  if (result.errors.empty()) require_exact(adapter.config.method, options);
  if (modules.size() < adapted_modules(adapter).size()) {  // what is left is named in full
    result.file.config.all_linear = false;
    result.file.config.target_modules = {};
  }
  return result;
}

}  // namespace corank
