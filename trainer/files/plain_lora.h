#pragma once
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "trainer/files/adapter_file.h"
#include "trainer/methods/methods.h"

/// Adapters for consumers that know one A and one B a module, one rank and one alpha.
namespace corank {

/// Where a decomposition finds the base weight [O, I] of a module.
using BaseWeights = std::function<at::Tensor(const std::string& module)>;

struct PlainLoraOptions {
  std::optional<int64_t> rank;  ///< of a decomposition; none: twice the adapter's largest
  double max_error = 0.05;      ///< largest relative error of a decomposed update, Frobenius norm
  BaseWeights base;             ///< may be empty where the conversion is exact
};

struct PlainLora {
  SavedAdapter file;
  std::vector<std::pair<std::string, double>> errors;  ///< by module, of decomposed updates; empty: exact
};

/// `modules` under one rank with alpha equal to it, so that nothing scales the products; smaller factors are filled up
/// with zeros. Targets, dropout and layout are those of `like`.
SavedAdapter plain_lora(const SavedAdapter& like, const std::vector<std::pair<std::string, PlainFactors>>& modules,
                        int64_t rank);

/// One module after the other: exact factors where the method has them (modules of rank 0 are left out), else the
/// leading singular part of merged weight less base weight. ConfigError for modules_to_save, which no plain LoRA holds,
/// for a rank where the conversion is exact and for a decomposition without base weights. InputError, naming the worst
/// module and the rank that would do, above max_error; and where nothing is left.
PlainLora to_plain_lora(const SavedAdapter& adapter, const PlainLoraOptions& options);

}  // namespace corank
