#include "trainer/methods/peft_name.h"

#include <set>

#include "configs/error.h"

namespace corank {

std::string peft_name(const std::string& module, const std::string& suffix) { return kPeftPrefix + module + suffix; }

std::string module_of(const std::string& tensor) { return tensor.substr(0, tensor.rfind('.')); }

bool is_of_module(const std::string& tensor, const std::string& module) {
  return module_of(tensor).ends_with("." + module);
}

std::vector<std::string> adapted_modules(const std::vector<std::string>& tensors) {
  std::vector<std::string> modules;
  std::set<std::string> seen;
  for (const std::string& name : tensors) {
    const size_t end = name.find(".lora_");
    if (!name.starts_with(kPeftPrefix) || name.find('.', std::string(kPeftPrefix).size() + 1) == std::string::npos)
      throw InputError("not a tensor name of an adapter: " + name);
    if (end == std::string::npos) continue;  // of modules_to_save
    const std::string module = name.substr(std::string(kPeftPrefix).size(), end - std::string(kPeftPrefix).size());
    if (seen.insert(module).second) modules.push_back(module);
  }
  return modules;
}

}  // namespace corank
