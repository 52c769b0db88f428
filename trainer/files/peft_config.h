#pragma once
#include <string>
#include <vector>

#include "trainer/methods/config.h"

namespace corank {

/// adapter_config.json as PEFT reads it (methods 3.3), from a config and the modules it adapted: patterns are written
/// as full module names, so that PEFT's sorting of keys cannot change which one matches first.
std::string peft_config_json(const AdapterConfig& config, const std::vector<std::string>& modules,
                             const std::string& base_model);
/// The way back. InputError, naming the field, for what changes the result and is not supported, and for fields that
/// are not known unless they are off (null, false, empty). `modules`: names that layers_to_transform chooses from;
/// those that it leaves are the targets.
AdapterConfig parse_peft_config(const std::string& json, const std::string& origin,
                                const std::vector<std::string>& modules);

}  // namespace corank
