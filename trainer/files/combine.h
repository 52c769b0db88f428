#pragma once
#include <optional>
#include <string>
#include <vector>

#include "trainer/files/adapter_file.h"

/// Several adapters as one, by PEFT's add_weighted_adapter (methods 2.5).
namespace corank {

struct WeightedAdapter {
  std::string origin;  ///< for messages
  SavedAdapter file;
  double weight = 1;
};

/// linear, cat, svd.
std::vector<std::string> combination_names();

/// A plain LoRA; a module that only some adapters have is theirs alone.
/// - linear: sums of the factors, each times the root of weight and scaling. Holds products of one adapter's B and
///   another's A: not the sum of the updates, unless there is one adapter. All ranks equal.
/// - cat: the weighted sum of the updates, exactly; rank = sum of the adapters' ranks.
/// - svd: the nearest of rank `rank` to that sum; none: the adapters' largest rank.
/// ConfigError for a rank beside another way than svd, for ranks that linear cannot add, and, with the remedy, for
/// adapters that are more than A and B. InputError where the same module has different sizes.
SavedAdapter combine(const std::vector<WeightedAdapter>& adapters, const std::string& how, std::optional<int64_t> rank);

}  // namespace corank
