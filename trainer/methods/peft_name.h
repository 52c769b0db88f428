#pragma once
#include <string>
#include <vector>

/// Names of tensors as PEFT's files have them.
namespace corank {

inline constexpr const char* kPeftPrefix = "base_model.model.";

/// base_model.model.<module><suffix>.
std::string peft_name(const std::string& module, const std::string& suffix);
/// base_model.model.<path>.<module> of base_model.model.<path>.<module>.<parameter>.
std::string module_of(const std::string& tensor);
/// Whether <module> of base_model.model.<path>.<module>.<parameter> is `module`.
bool is_of_module(const std::string& tensor, const std::string& module);
/// Modules that the tensors adapt, in order of appearance, without those of modules_to_save. InputError for a name that
/// is none of an adapter's.
std::vector<std::string> adapted_modules(const std::vector<std::string>& tensors);

}  // namespace corank
