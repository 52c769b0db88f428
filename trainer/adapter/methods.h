#pragma once
#include <memory>
#include <string>
#include <vector>

#include "comm/ledger.h"
#include "trainer/adapter/adapter.h"
#include "trainer/adapter/config.h"

namespace corank {

class Model;

/// One way of fine-tuning, for a whole run. A method is one file and one line of the table in methods.cpp.
class AdapterMethod {
 public:
  virtual ~AdapterMethod() = default;
  /// Registers what trains: adapters on the matched linears, or base weights. `seed` keys the initial values.
  virtual void attach(Model& model, ParameterStore& store, uint64_t seed) = 0;
  /// After the optimizer's step `step` (from 1), on every rank.
  virtual void on_step_end(int64_t /*step*/) {}
  /// Under which purpose its gradients travel.
  virtual Purpose gradient_purpose() const { return Purpose::adapter_gradients; }
  /// True: the result is a model folder (full fine-tuning); false: a PEFT adapter folder.
  virtual bool trains_base() const { return false; }
};

std::vector<std::string> method_names();
/// ConfigError listing the known methods if the name is unknown.
std::unique_ptr<AdapterMethod> make_method(const AdapterConfig& config);

// The table's entries.
std::unique_ptr<AdapterMethod> make_lora(const AdapterConfig& config);
std::unique_ptr<AdapterMethod> make_full(const AdapterConfig& config);

}  // namespace corank
