#pragma once
#include <functional>
#include <string>
#include <vector>

#include "configs/reader.h"
#include "trainer/methods/config.h"

namespace corank {

/// One key of the `adapter` section.
struct AdapterKey {
  std::string name;
  std::function<std::string(const AdapterConfig&)> yaml;  ///< its value in the resolved run; empty: left out
  /// A LoRA run file has it anyway: a method without it ignores it, so that one override changes the method. Others are
  /// refused.
  bool in_every_file = false;
  std::vector<std::string> methods;  ///< that have it; empty: all

  bool of(const std::string& method) const;
};
/// Those of every method in the table.
std::vector<AdapterKey> adapter_keys();

/// Names of the keys that every method has which adapts linears, and `more`.
std::vector<std::string> keys_of_adapters(const std::vector<std::string>& more);

/// ConfigError if a key of `written` does not belong to `method`, which `origin` holds.
void require_keys_of_method(const std::vector<std::string>& written, const std::string& method,
                            const std::string& origin);

/// Reads the `adapter` section. ConfigError for values that PEFT would refuse too.
AdapterConfig read_adapter_config(const Section& section);

}  // namespace corank
