#pragma once
#include <gtest/gtest.h>

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

/// What the tests of trainer/ share.
namespace corank::test {

/// ||a - b|| / ||b|| in float64; 0 if both are zero.
double relative_error(const at::Tensor& a, const at::Tensor& b);

/// The ranks of `world` (null: this process alone) as this build's tests have them: MPI, or NCCL in those of GPUs.
std::unique_ptr<Communicator> ranks_of(const World* world, Ledger& ledger);

/// Everything between a model and a step, over the ranks of `world` (null: this process alone).
struct TrainingRun {
  TrainingRun(const World* world, int tensor, ModelOptions options, const AdapterConfig& adapter,
              OptimizerOptions optimizer = {}, uint64_t seed = 42, const SavedAdapter* file = nullptr);

  StepStats step(const StepBatches& batches, int64_t number, double learning_rate, double max_grad_norm = 1.0);

  Ledger ledger;
  Mesh mesh;
  std::unique_ptr<Model> model;
  std::unique_ptr<AdapterMethod> method;
  ParameterStore store;
  std::unique_ptr<Optimizer> optimizer;
  std::unique_ptr<GradReducer> reducer;
  uint64_t seed;
};

/// Adds the gradients of a global batch to the store, without a step; returns its loss.
double accumulate(TrainingRun& run, const StepBatches& batches);

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

}  // namespace corank::test
