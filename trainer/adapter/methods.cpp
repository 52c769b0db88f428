#include "trainer/adapter/methods.h"

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
