#pragma once
#include <optional>
#include <string>

namespace corank {

/// quantization_config of a config.json (methods 6.6).
struct StoredNf4 {
  bool double_quant = false;
};

/// Nothing where config.json says that the weights are not quantised. InputError for another way than nf4.
std::optional<StoredNf4> stored_as_nf4(const std::string& config_json, const std::string& origin);

}  // namespace corank
