#pragma once
#include <ATen/ATen.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "trainer/ops/weight.h"
#include "trainer/weights/residency.h"
#include "trainer/weights/shard.h"

namespace corank {

/// How the gradient that this rank forms becomes the whole one (methods 10.8).
enum class GradientScope {
  everywhere,  ///< replicated over tp, each rank forms a partial sum: summed over dp x tp
  data,        ///< sharded, or replicated and exact on every tp rank: summed over dp
  summed,      ///< shared by the dp ranks (ParameterSpec::share): arrives summed
};

struct ParameterSpec {
  std::string name;            ///< in PEFT's file, or Hugging Face's for base weights
  std::vector<int64_t> shape;  ///< full
  Shard shard;
  GradientScope scope = GradientScope::data;
  std::shared_ptr<TrainedShare> share = nullptr;            ///< scope summed: this rank keeps a flat part of its block
  bool decays = true;                                       ///< weight decay applies
  double lr_scale = 1;                                      ///< times the run's learning rate
  std::function<void(const at::Tensor& local)> initialise;  ///< fills this rank's block (master dtype)
  std::function<void(const ops::Weight& weight)> bind;      ///< hands the allocated tensors to their user
};

/// InputError unless `full` has the parameter's full shape.
void require_shape(const ParameterSpec& spec, const at::Tensor& full);

/// Everything that trains, in one flat buffer: masters (float32), gradients, and copies in the compute dtype where it
/// differs. Order: by scope, then in order of add(); so the gradients of one scope are one tensor.
///
///   store.add(spec) ...; store.allocate(...);   // initialises and binds
///   forward, backward                            // gradients add up in gradients()
///   optimizer on masters(); store.refresh();     // compute copies follow
class ParameterStore {
 public:
  struct Parameter {
    ParameterSpec spec;
    at::Tensor master;    ///< view into masters(), without requires_grad; flat where the ranks share it
    at::Tensor gradient;  ///< view into gradients()
    ops::Weight weight;
    int64_t begin = 0;  ///< element offset in the flat buffers
  };

  /// InternalError if the name exists or allocate() was called.
  void add(ParameterSpec spec);
  /// `master_dtype` float32 (float64 in tests), `compute_dtype` what the model computes in.
  void allocate(at::Device device, at::ScalarType master_dtype, at::ScalarType compute_dtype);

  /// Scales the learning rate of what was added so far, before allocate().
  void scale_learning_rates(const std::function<double(const ParameterSpec&)>& scale);

  const std::vector<Parameter>& parameters() const { return parameters_; }
  const Parameter& at(const std::string& name) const;
  const at::Tensor& masters() const { return masters_; }
  const at::Tensor& gradients() const { return gradients_; }
  at::Tensor gradients_of(GradientScope scope) const;
  /// Full (unsharded) and local numbers of parameters.
  int64_t num_parameters() const;
  int64_t num_local() const { return masters_.numel(); }

  /// Copies masters into the compute copies; call after every change of masters.
  void refresh();
  /// Overwrites the block of a parameter with its part of a full tensor. InputError if the shape differs.
  void load(const std::string& name, const at::Tensor& full);
  /// The part of a full tensor that this rank keeps, in the master's shape. InputError if the shape differs.
  at::Tensor part_of(const Parameter& parameter, const at::Tensor& full) const;
  /// Collective over tp, and over dp where its ranks share parameters. Full tensors of all parameters by name, on the
  /// CPU, from a flat buffer laid out like masters().
  std::vector<std::pair<std::string, at::Tensor>> gather(const at::Tensor& flat, Communicator& tp) const;

 private:
  std::vector<Parameter> parameters_;
  std::map<std::string, size_t> index_;
  int64_t num_everywhere_ = 0, num_data_ = 0;
  at::Tensor masters_, gradients_, compute_;
};

}  // namespace corank
