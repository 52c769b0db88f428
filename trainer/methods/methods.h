#pragma once
#include <memory>
#include <string>
#include <vector>

#include "trainer/methods/exchange.h"
#include "trainer/methods/gradient_traffic.h"
#include "trainer/methods/method_entry.h"
#include "trainer/methods/training.h"

namespace corank {

/// One way of fine-tuning, for a whole run: a file that implements the three together and an entry of the table.
class AdapterMethod : public MethodTraining, public MethodExchange, public MethodTraffic {
 public:
  explicit AdapterMethod(AdapterConfig config) : MethodExchange(std::move(config)) {}
};

/// The table, in order.
const std::vector<const MethodEntry*>& methods();
std::vector<std::string> method_names();
/// ConfigError listing the known methods if the name is unknown.
const MethodEntry& method_entry(const std::string& name);
std::unique_ptr<AdapterMethod> make_method(const AdapterConfig& config);

/// For tests: the table has `entry` too, at its end, as long as this lives.
class ScopedMethod {
 public:
  explicit ScopedMethod(const MethodEntry& entry);
  ~ScopedMethod();
  ScopedMethod(const ScopedMethod&) = delete;
  ScopedMethod& operator=(const ScopedMethod&) = delete;

 private:
  const MethodEntry& entry_;
};

// The table's entries.
const MethodEntry& lora_method();
const MethodEntry& dora_method();
const MethodEntry& adalora_method();
const MethodEntry& mora_method();
const MethodEntry& pissa_method();
const MethodEntry& full_method();

}  // namespace corank
