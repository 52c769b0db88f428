#pragma once
#include <string>
#include <vector>

#include "trainer/adapter/config.h"

namespace corank {

/// adapter_config.json as PEFT reads it (methods 3.3), from a config and the modules it adapted: patterns are written
/// as full module names, so that PEFT's sorting of keys cannot change which one matches first.
std::string peft_config_json(const AdapterConfig& config, const std::vector<std::string>& modules,
                             const std::string& base_model);
/// The way back. InputError for fields that change the result and are not supported.
AdapterConfig parse_peft_config(const std::string& json, const std::string& origin);

}  // namespace corank
