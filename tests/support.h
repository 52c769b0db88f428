#pragma once
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "comm/backends.h"
#include "comm/mesh.h"
#include "comm/world.h"
#include "data/loader.h"
#include "trainer/methods/start.h"
#include "trainer/models/families.h"
#include "trainer/run/optimizer.h"
#include "trainer/run/schedule.h"
#include "trainer/run/step.h"
#include "trainer/run/traffic.h"

/// What the tests of trainer/ share.
namespace corank::test {

/// ||a - b|| / ||b|| in float64; 0 if both are zero.
double relative_error(const at::Tensor& a, const at::Tensor& b);

/// The ranks of a program as a mesh, and what they have sent since it began: look at differences.
struct SharedMesh {
  SharedMesh(const World* world, int tensor, int parts);

  Ledger ledger;
  Mesh mesh;
};

/// Collective over `world` (null: this process alone). Made for the first that asks, then shared until the program
/// ends: NCCL takes a second and more for every group. The backend is this build's, MPI or, in the tests of GPUs, NCCL;
/// cross-check is on. MPI ranks count as those of two hosts by turns, so that groups of each kind span hosts. `parts`:
/// the ranks are as many meshes of equal size, of which this rank is in one.
SharedMesh& shared_mesh(const World* world, int tensor, int parts = 1);

/// Of all groups of `mesh`; alike on all ranks.
void set_cross_check(const Mesh& mesh, bool on);

/// Everything between a model and a step, over the ranks of `world` (null: this process alone).
struct TrainingRun {
  TrainingRun(const World* world, int tensor, ModelOptions options, const AdapterConfig& adapter,
              OptimizerOptions optimizer = {}, uint64_t seed = 42, const SavedAdapter* file = nullptr);
  /// Gradients are summed as `how` says (comm/gradient_sum.h).
  TrainingRun(SharedMesh& shared, ModelOptions options, const AdapterConfig& adapter, const std::string& how,
              OptimizerOptions optimizer = {}, uint64_t seed = 42, const SavedAdapter* file = nullptr);

  StepParts parts() { return {mesh, *model, *method, store, *optimizer, *sum, dropout}; }
  StepStats step(const StepBatches& batches, int64_t number, double learning_rate, double max_grad_norm = 1.0);

  Ledger& ledger;    ///< shared
  const Mesh& mesh;  ///< shared
  std::unique_ptr<Model> model;
  std::unique_ptr<AdapterMethod> method;
  ParameterStore store;
  std::unique_ptr<Optimizer> optimizer;
  std::string how_to_sum;
  std::unique_ptr<GradientSum> sum;
  DropoutKeys dropout;
};

/// Adds the gradients of a global batch to the store, without a step; returns its loss.
double accumulate(TrainingRun& run, const StepBatches& batches);

Ledger::Snapshot difference(const Ledger::Snapshot& now, const Ledger::Snapshot& before);

/// Traffic of this rank in step `step` of `run` (of `model` and `adapter`) on `batches`, as predicted.
Ledger::Snapshot predicted_bytes(const TrainingRun& run, const ModelOptions& model, const AdapterConfig& adapter,
                                 const StepBatches& batches, int64_t step);
/// By purpose and link, to the byte.
void expect_bytes(const Ledger::Snapshot& counted, const Ledger::Snapshot& predicted, const std::string& what);

/// Collective over the world. Parameters that are not the same bits on all ranks that hold them.
std::vector<std::string> unequal_replicas(const Mesh& mesh, const ParameterStore& store);

/// A path below tests/golden or the repository.
std::string golden(const std::string& name);
std::string repository(const std::string& name);

/// A fresh folder, removed with the object.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  std::string path(const std::string& name = "") const { return name.empty() ? path_ : path_ + "/" + name; }

 private:
  std::string path_;
};

/// Collective over `world`. A folder that all ranks see; it goes with the object.
class SharedFolder {
 public:
  explicit SharedFolder(const World& world);
  ~SharedFolder();
  const std::string& path() const { return path_; }

 private:
  const World& world_;
  std::unique_ptr<TemporaryFolder> folder_;  ///< rank 0's
  std::string path_;
};

}  // namespace corank::test
