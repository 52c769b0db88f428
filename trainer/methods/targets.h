#pragma once
#include <string>
#include <vector>

#include "trainer/methods/config.h"

namespace corank {

/// "all-linear" in any case of letters.
bool is_all_linear(const ModulePattern& targets);

/// ConfigError if the targets match one of `others`, modules that take no adapter. PEFT would adapt the head and the
/// embedding too, and refuse norms.
void require_only_linears(const AdapterConfig& config, const std::vector<std::string>& others);

/// ConfigError for an entry of exclude_modules, rank_pattern or alpha_pattern that concerns none of the linears that
/// the targets match: a typing error that would silently train something else.
void require_every_entry(const AdapterConfig& config, const std::vector<std::string>& linears);

/// The modules of `linears` that the config adapts, in order. ConfigError, with the nearest names, if there is none.
std::vector<std::string> select_targets(const AdapterConfig& config, const std::vector<std::string>& linears);

}  // namespace corank
