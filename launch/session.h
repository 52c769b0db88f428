#pragma once
#include <memory>
#include <string>
#include <vector>

#include "comm/backends.h"
#include "comm/gradient_sum.h"
#include "comm/mesh.h"
#include "data/token_file.h"
#include "launch/run_config.h"
#include "trainer/layers/model.h"
#include "trainer/methods/adapter_set.h"
#include "trainer/methods/methods.h"
#include "trainer/run/checkpoint.h"

namespace corank {

/// `run` as commands read it that use what training left: its adapter section in the form in which its method hands
/// adapters on (PiSSA: a LoRA of twice the rank). ConfigError where that is not the trained adapter over a base that is
/// `quantised` by the run.
RunConfig with_trained_adapter(RunConfig run, bool quantised);

/// The adapter at adapter.path, checked, its configuration merged with the run's keys.
SavedAdapter read_run_adapter(const RunConfig& run, Model& model);

/// The parts that every command with a model shares, built in order and destroyed in reverse: ledger, mesh, model,
/// method, parameters.
class Session {
 public:
  /// Collective over the world. Builds the mesh, loads this rank's shards, attaches the adapter and loads its weights
  /// from adapter.path if the run names one. Throws before any training state exists.
  Session(RunConfig run, const World& world);

  const RunConfig& run() const { return run_; }
  Ledger& ledger() { return ledger_; }
  const Mesh& mesh() const { return *mesh_; }
  Model& model() { return *model_; }
  AdapterMethod& method() { return *method_; }
  ParameterStore& store() { return store_; }
  bool leader() const { return mesh_->world().rank() == 0; }

 private:
  RunConfig run_;
  Ledger ledger_;
  std::unique_ptr<Mesh> mesh_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<AdapterMethod> method_;
  ParameterStore store_;
};

/// An adapter of the command line.
struct NamedAdapter {
  std::string name, path;
};

/// The parts of a command that only asks a model: the base, loaded once, and adapters over it, switched by name.
class Inference {
 public:
  /// Collective over the world. The adapter of adapter.path comes first, as "default", then `adapters`, which bring
  /// their whole configuration along; the base is in use. ConfigError, InputError, MissingError.
  Inference(RunConfig run, const std::vector<NamedAdapter>& adapters, bool merged, const World& world);

  const Mesh& mesh() const { return *mesh_; }
  Model& model() { return *model_; }
  AdapterSet& adapters() { return *adapters_; }
  bool leader() const { return mesh_->world().rank() == 0; }

 private:
  Ledger ledger_;
  std::unique_ptr<Mesh> mesh_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<AdapterSet> adapters_;
};

/// Collective over the world. Shares the cores of each host among its ranks and returns the threads of a rank, at most
/// one if asked to: as many on all as where they are fewest, because bits of sums depend on their number.
int share_cores(const World& world, bool one_thread = false);

/// How `session` sums its gradients.
std::unique_ptr<GradientSum> make_gradient_sum(Session& session);

}  // namespace corank
