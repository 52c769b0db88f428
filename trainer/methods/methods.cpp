#include "trainer/methods/methods.h"

#include <fmt/format.h>

namespace corank {
namespace {

struct Method {
  const char* name;
  std::unique_ptr<AdapterMethod> (*make)(const AdapterConfig&);
};

constexpr Method kMethods[] = {
    {"lora", make_lora}, {"dora", make_dora},   {"adalora", make_adalora},
    {"mora", make_mora}, {"pissa", make_pissa}, {"full", make_full},
};

}  // namespace

ModuleParts AdapterMethod::parts(const std::string& module) const {
  const int64_t r = config_.rank_of(module);
  return {{".lora_A.weight", {r, -1}}, {".lora_B.weight", {-1, r}}};
}

std::string AdapterMethod::beyond_plain_lora() const { return config_.method + " is more than A and B"; }

std::string AdapterMethod::consumers() const {
  const std::string beyond = beyond_plain_lora();
  return "PEFT and transformers load it as it is; " +
         (beyond.empty()
              ? "so do consumers of plain LoRA (vLLM, S-LoRA, llama.cpp's converter) up to their largest rank."
              : "consumers of plain LoRA (vLLM, S-LoRA, llama.cpp's converter) do not: " + beyond + ".");
}

GradientSizes lora_gradient_sizes(const LinearSize& linear, int64_t rank, int tensor) {
  return {rank * (linear.row ? linear.out : linear.in), rank * (linear.row ? linear.in : linear.out) / tensor};
}

std::vector<std::string> method_names() {
  std::vector<std::string> names;
  for (const Method& method : kMethods) names.emplace_back(method.name);
  return names;
}

std::unique_ptr<AdapterMethod> make_method(const AdapterConfig& config) {
  for (const Method& method : kMethods) {
    if (config.method == method.name) return method.make(config);
  }
  throw ConfigError(
      fmt::format("adapter.method: '{}' is not one of {}", config.method, fmt::join(method_names(), ", ")));
}

}  // namespace corank
