#pragma once
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "comm/ledger.h"
#include "comm/mesh.h"
#include "trainer/layers/adapter.h"
#include "trainer/methods/config.h"

namespace corank {

class Model;
struct SavedAdapter;

/// One linear as far as counts go; full sizes.
struct LinearSize {
  std::string name;
  int64_t in = 0, out = 0;
  bool row = false;  ///< row-parallel, else column-parallel
  bool bias = false;
};

/// Elements of gradient that one rank hands over: summed over dp x tp, and over dp (methods 10.8).
struct GradientSizes {
  int64_t everywhere = 0, data = 0;
};

/// The tensors of one module by the end of their PEFT name (".lora_A.weight"), full, float32 or float64.
using ModuleTensors = std::map<std::string, at::Tensor>;

/// The update of one linear as plain LoRA has it, with every scaling inside: the product b a.
struct PlainFactors {
  at::Tensor b_OR, a_RI;
};

/// Ends of PEFT names with full shapes; -1 where any size will do.
using ModuleParts = std::vector<std::pair<std::string, std::vector<int64_t>>>;

/// One way of fine-tuning, for a whole run. A method is one file and one line of the table in methods.cpp. Order of
/// calls: attach, (the store allocates), initialise, (weights are loaded), begin; then in each step add_gradients and
/// on_step_end.
class AdapterMethod {
 public:
  explicit AdapterMethod(AdapterConfig config) : config_(std::move(config)) {}
  virtual ~AdapterMethod() = default;
  const AdapterConfig& config() const { return config_; }
  /// Registers what trains: adapters on the matched linears, or base weights. `seed` keys the initial values.
  virtual void attach(Model& model, ParameterStore& store, uint64_t seed) = 0;
  /// Collective over the mesh. Initial values that need the base weights.
  virtual void initialise(const Mesh& /*mesh*/) {}
  /// Collective over the mesh. Parameters have their starting values, fresh, loaded or resumed.
  virtual void begin(const Mesh& /*mesh*/) {}
  /// Collective over the mesh. Adds to the reduced gradients what does not come from the loss, before clipping.
  virtual void add_gradients(int64_t /*step*/, const Mesh& /*mesh*/) {}
  /// Collective over the mesh. After the optimizer's step `step` (from 1); gradients are still those of the step. True:
  /// the optimizer's moments start again at zero.
  virtual bool on_step_end(int64_t /*step*/, const Mesh& /*mesh*/) { return false; }

  /// What a checkpoint must hold beside parameters and moments: buffers by name, laid out like the store's masters,
  /// which a resume overwrites in place before begin().
  virtual std::vector<std::pair<std::string, at::Tensor>> state() { return {}; }

  /// Optimizer steps since the moments were last zero, step `step` included: what bias correction counts.
  virtual int64_t age_of_moments(int64_t step) const { return step; }
  /// What the schedule's learning rate is multiplied by in step `step`.
  virtual double learning_rate_scale(int64_t /*step*/) const { return 1; }

  /// Collective over tp. Full tensors that an adapter file must hold beside the parameters.
  virtual std::vector<std::pair<std::string, at::Tensor>> extra_tensors(Communicator& /*tp*/) const { return {}; }
  /// The way back: takes out of `tensors` what extra_tensors() gave and no parameter or state() brings, before begin().
  /// InputError where a shape is not the run's.
  virtual void take_extra(std::vector<std::pair<std::string, at::Tensor>>& /*tensors*/) {}

  /// Under which purpose its gradients travel.
  virtual Purpose gradient_purpose() const { return Purpose::adapter_gradients; }
  /// True: the result is a model folder (full fine-tuning); false: a PEFT adapter folder.
  virtual bool trains_base() const { return false; }

  /// Gradient of an adapted linear over `tensor` ranks, from formulas (methods 11.1).
  virtual GradientSizes gradient_sizes(const LinearSize& linear, int tensor) const = 0;
  /// Bytes of adapter_statistics that one rank hands over in step `step`, from formulas.
  virtual int64_t statistics_bytes(const std::vector<LinearSize>& /*adapted*/, int /*tensor*/, int /*data*/,
                                   int64_t /*step*/) const {
    return 0;
  }
  /// The tensors of one module in an adapter file.
  virtual ModuleParts parts(const std::string& module) const;
  /// The configuration of the form in which to_peft and from_checkpoint hand the adapter on.
  virtual AdapterConfig exchange_config() const { return config_; }
  /// Why that form is not the trained adapter over a base that the run quantised, and what to do; empty: it is.
  virtual std::string beyond_quantised() const { return ""; }
  /// Turns what a checkpoint holds into what PEFT loads.
  virtual void to_peft(SavedAdapter& /*file*/) const {}
  /// The way back.
  virtual void from_peft(SavedAdapter& /*file*/) const {}
  /// Turns what adapter.h5 holds into an adapter on the model's own weights.
  virtual void from_checkpoint(SavedAdapter& /*file*/) const {}
  /// Why no PEFT folder can hold it, and what to do; empty: one can.
  virtual std::string beyond_peft() const { return ""; }
  /// Why consumers that know one A and B of one rank and alpha a module cannot take it; empty: they can.
  virtual std::string beyond_plain_lora() const;
  /// Factors whose product is the update of `module` exactly; perhaps of rank 0. None where the update has a higher
  /// rank than any factors worth having: merged() less the weight is then to be decomposed.
  virtual std::optional<PlainFactors> plain_factors(const std::string& /*module*/,
                                                    const ModuleTensors& /*tensors*/) const {
    return std::nullopt;
  }
  /// Who loads the folder that to_peft makes, one sentence.
  virtual std::string consumers() const;
  /// The weight of which the adapted linear is the product: the plain formula, on full tensors in one dtype. With the
  /// tensors of an adapter file, w_OI is the model's own weight; with those of the store alone, the one under training.
  virtual at::Tensor merged(const std::string& module, const ModuleTensors& tensors, const at::Tensor& w_OI) const = 0;

 protected:
  AdapterConfig config_;
};

/// LoRA's factors: the one that the split does not touch is replicated.
GradientSizes lora_gradient_sizes(const LinearSize& linear, int64_t rank, int tensor);

std::vector<std::string> method_names();
/// ConfigError listing the known methods if the name is unknown.
std::unique_ptr<AdapterMethod> make_method(const AdapterConfig& config);

// The table's entries.
std::unique_ptr<AdapterMethod> make_lora(const AdapterConfig& config);
std::unique_ptr<AdapterMethod> make_dora(const AdapterConfig& config);
std::unique_ptr<AdapterMethod> make_adalora(const AdapterConfig& config);
std::unique_ptr<AdapterMethod> make_mora(const AdapterConfig& config);
std::unique_ptr<AdapterMethod> make_pissa(const AdapterConfig& config);
std::unique_ptr<AdapterMethod> make_full(const AdapterConfig& config);

}  // namespace corank
