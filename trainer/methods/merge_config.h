#pragma once
#include <string>
#include <vector>

#include "trainer/methods/config.h"

namespace corank {

/// The config of a run that starts from `file`: keys that the run file leaves out come from the file; keys in both must
/// mean the same, else ConfigError naming both. `written` holds the keys of the run's adapter section.
AdapterConfig merge_with_file(const AdapterConfig& run, const std::vector<std::string>& written,
                              const AdapterConfig& file, const std::vector<std::string>& linears);

}  // namespace corank
