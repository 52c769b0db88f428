#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "comm/mesh.h"
#include "trainer/layers/adapter.h"

namespace corank {

/// One linear as far as counts go; full sizes.
struct LinearSize {
  std::string name;
  int64_t in = 0, out = 0;
  bool row = false;  ///< row-parallel, else column-parallel
  bool bias = false;
  LinearRole role = LinearRole::attention_in;
};

/// Elements of gradient that one rank hands over: summed over dp x tp, and over dp (methods 10.8).
struct GradientSizes {
  int64_t everywhere = 0, data = 0;
};

/// What the update of one adapted linear costs a rank beside its parameters; counts are a token's unless they say more.
struct UpdateCost {
  /// How often the linear's input and output features pass through memory.
  struct Passes {
    double input = 0, output = 0;
  };
  int64_t kept = 0;           ///< elements that forward leaves for backward, beside the input
  bool keeps_output = false;  ///< and the output of the linear itself
  int64_t kept_once = 0;      ///< elements that one pass leaves, however many tokens it has
  int64_t state_bytes = 0;    ///< of the linear, beside masters, gradients and moments
  Passes forward, backward;
};

/// A collective of a step, from formulas.
struct StepCollective {
  Purpose purpose = Purpose::adapter_gradients;
  Axis axis = Axis::world;
  Transfer transfer;
  int64_t calls = 1;
};

/// What a method sends and keeps in a step, from formulas.
class MethodTraffic {
 public:
  virtual ~MethodTraffic() = default;
  /// True: the result is a model folder (full fine-tuning); false: a PEFT adapter folder.
  virtual bool trains_base() const { return false; }
  /// Under which purpose its gradients travel.
  virtual Purpose gradient_purpose() const { return Purpose::adapter_gradients; }
  /// Gradient of an adapted linear over `tensor` ranks (methods 11.1).
  virtual GradientSizes gradient_sizes(const LinearSize& linear, int tensor) const = 0;
  /// `linear` is adapted; kept activations are in the run's dtype.
  virtual UpdateCost update_cost(const LinearSize& linear, int tensor) const = 0;
  /// The collectives of adapter_statistics in step `step`, over groups of however many ranks.
  virtual std::vector<StepCollective> statistics(const std::vector<LinearSize>& /*adapted*/, int64_t /*step*/) const {
    return {};
  }
  /// How often a step reads the frozen weight of an adapted linear apart from products.
  virtual int64_t base_reads() const { return 0; }
};

/// LoRA's factors: the one that the split does not touch is replicated.
GradientSizes lora_gradient_sizes(const LinearSize& linear, int64_t rank, int tensor);
/// LoRA's products: x A^T and the addition of its product with B; backward each factor's gradient, its input's, x's.
UpdateCost lora_update_cost(int64_t rank);

}  // namespace corank
