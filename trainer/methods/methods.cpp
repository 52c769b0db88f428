#include "trainer/methods/methods.h"

#include <fmt/format.h>

namespace corank {
namespace {

std::vector<const MethodEntry*>& method_table() {
  static std::vector<const MethodEntry*> table{
      &lora_method(), &dora_method(), &adalora_method(), &mora_method(), &pissa_method(), &full_method(),
  };
  return table;
}

}  // namespace

ModuleParts MethodExchange::parts(const std::string& module) const {
  const int64_t r = config_.rank_of(module);
  return {{".lora_A.weight", {r, -1}}, {".lora_B.weight", {-1, r}}};
}

std::string MethodExchange::beyond_plain_lora() const { return config_.method + " is more than A and B"; }

std::string MethodExchange::consumers() const {
  const std::string beyond = beyond_plain_lora();
  return "PEFT and transformers load it as it is; " +
         (beyond.empty()
              ? "so do consumers of plain LoRA (vLLM, S-LoRA, llama.cpp's converter) up to their largest rank."
              : "consumers of plain LoRA (vLLM, S-LoRA, llama.cpp's converter) do not: " + beyond + ".");
}

GradientSizes lora_gradient_sizes(const LinearSize& linear, int64_t rank, int tensor) {
  return {rank * (linear.row ? linear.out : linear.in), rank * (linear.row ? linear.in : linear.out) / tensor};
}

UpdateCost lora_update_cost(int64_t rank) {
  return {.kept = rank, .forward = {.input = 1, .output = 2}, .backward = {.input = 3, .output = 2}};
}

const std::vector<const MethodEntry*>& methods() { return method_table(); }

std::vector<std::string> method_names() {
  std::vector<std::string> names;
  for (const MethodEntry* method : methods()) names.push_back(method->name());
  return names;
}

const MethodEntry& method_entry(const std::string& name) {
  for (const MethodEntry* method : methods()) {
    if (name == method->name()) return *method;
  }
  throw ConfigError(fmt::format("adapter.method: '{}' is not one of {}", name, fmt::join(method_names(), ", ")));
}

std::unique_ptr<AdapterMethod> make_method(const AdapterConfig& config) {
  return method_entry(config.method).make(config);
}

ScopedMethod::ScopedMethod(const MethodEntry& entry) : entry_(entry) { method_table().push_back(&entry); }
ScopedMethod::~ScopedMethod() { std::erase(method_table(), &entry_); }

}  // namespace corank
