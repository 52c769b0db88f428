#pragma once
#include <string>
#include <utility>
#include <vector>

#include "comm/mesh.h"
#include "trainer/layers/parameters.h"

namespace corank {

class Model;

/// How a method trains. Order of calls: attach, (the store allocates), initialise, (weights are loaded), begin; then in
/// each step add_gradients and on_step_end.
class MethodTraining {
 public:
  virtual ~MethodTraining() = default;
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
  /// Optimizer steps since the moments were last zero, step `step` included: what bias correction counts.
  virtual int64_t age_of_moments(int64_t step) const { return step; }
  /// What the schedule's learning rate is multiplied by in step `step`.
  virtual double learning_rate_scale(int64_t /*step*/) const { return 1; }

  /// What a checkpoint must hold beside parameters and moments: buffers by name, laid out like the store's masters,
  /// which a resume overwrites in place before begin().
  virtual std::vector<std::pair<std::string, at::Tensor>> state() { return {}; }
  /// Collective over tp. Full tensors that an adapter file must hold beside the parameters.
  virtual std::vector<std::pair<std::string, at::Tensor>> extra_tensors(Communicator& /*tp*/) const { return {}; }
  /// The way back: takes out of `tensors` what extra_tensors() gave and no parameter or state() brings, before begin().
  /// InputError where a shape is not the run's.
  virtual void take_extra(std::vector<std::pair<std::string, at::Tensor>>& /*tensors*/) {}
};

}  // namespace corank
