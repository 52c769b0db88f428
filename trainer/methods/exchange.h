#pragma once
#include <ATen/ATen.h>

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "trainer/methods/config.h"

namespace corank {

struct SavedAdapter;

/// The tensors of one module by the end of their PEFT name (".lora_A.weight"), full, float32 or float64.
using ModuleTensors = std::map<std::string, at::Tensor>;

/// The update of one linear as plain LoRA has it, with every scaling inside: the product b a.
struct PlainFactors {
  at::Tensor b_OR, a_RI;
};

/// Ends of PEFT names with full shapes; -1 where any size will do.
using ModuleParts = std::vector<std::pair<std::string, std::vector<int64_t>>>;

/// What a method's adapters are outside a run, for files: full tensors under PEFT's names. Needs the config alone.
class MethodExchange {
 public:
  explicit MethodExchange(AdapterConfig config) : config_(std::move(config)) {}
  virtual ~MethodExchange() = default;
  const AdapterConfig& config() const { return config_; }

  /// The tensors of one module in an adapter file.
  virtual ModuleParts parts(const std::string& module) const;
  /// The weight of which the adapted linear is the product: the plain formula, on full tensors in one dtype. With the
  /// tensors of an adapter file, w_OI is the model's own weight; with those of the store alone, the one under training.
  virtual at::Tensor merged(const std::string& module, const ModuleTensors& tensors, const at::Tensor& w_OI) const = 0;

  /// Turns what adapter.h5 holds into an adapter on the model's own weights.
  virtual void from_checkpoint(SavedAdapter& /*file*/) const {}
  /// Turns what a checkpoint holds into what PEFT loads.
  virtual void to_peft(SavedAdapter& /*file*/) const {}
  /// The way back.
  virtual void from_peft(SavedAdapter& /*file*/) const {}
  /// The configuration of the form in which to_peft and from_checkpoint hand the adapter on.
  virtual AdapterConfig exchange_config() const { return config_; }

  /// Why that form is not the trained adapter over a base that the run quantised, and what to do; empty: it is.
  virtual std::string beyond_quantised() const { return ""; }
  /// Why no PEFT folder can hold it, and what to do; empty: one can.
  virtual std::string beyond_peft() const { return ""; }
  /// Why consumers that know one A and B of one rank and alpha a module cannot take it; empty: they can.
  virtual std::string beyond_plain_lora() const;
  /// Whether its parts are A and B and its update scaling_of() times their product, so that adapters of it add up.
  virtual bool has_only_factors() const { return false; }
  /// Factors whose product is the update of `module` exactly; perhaps of rank 0. None where the update has a higher
  /// rank than any factors worth having: merged() less the weight is then to be decomposed.
  virtual std::optional<PlainFactors> plain_factors(const std::string& /*module*/,
                                                    const ModuleTensors& /*tensors*/) const {
    return std::nullopt;
  }
  /// Who loads the folder that to_peft makes, one sentence.
  virtual std::string consumers() const;

 protected:
  AdapterConfig config_;
};

}  // namespace corank
