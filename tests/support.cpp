#include "tests/support.h"

#include <torch/csrc/autograd/autograd.h>

#include <cstdlib>
#include <filesystem>

#ifdef CORANK_GPU_TEST
#include <c10/cuda/CUDAFunctions.h>
#endif

namespace corank::test {

std::unique_ptr<Communicator> ranks_of(const World* world, Ledger& ledger) {
#ifdef CORANK_GPU_TEST
  if (world) return make_communicator("nccl", *world, ledger);
  return make_solo_communicator(at::Device(at::kCUDA, c10::cuda::current_device()), ledger);
#else
  return world ? make_communicator("mpi", *world, ledger) : make_solo_communicator(at::kCPU, ledger);
#endif
}

double relative_error(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.to(at::kCPU, at::kDouble), y = b.to(at::kCPU, at::kDouble);
  const double difference = at::linalg_vector_norm(x - y).item<double>(),
               size = at::linalg_vector_norm(y).item<double>();
  return difference == 0 ? 0 : difference / size;
}

TrainingRun::TrainingRun(const World* world, int tensor, ModelOptions options, const AdapterConfig& adapter,
                         OptimizerOptions optimizer_options, uint64_t run_seed, const SavedAdapter* file)
    : mesh(ranks_of(world, ledger), tensor), seed(run_seed) {
  options.device = mesh.device();
  model = load_model(options, mesh.tp());
  method = make_method(adapter);
  start_method(*method, *model, store, mesh, options.dtype, seed, file);
  optimizer = std::make_unique<Optimizer>(store, optimizer_options);
  reducer = std::make_unique<GradReducer>(mesh, store.gradients_of(GradientScope::everywhere),
                                          store.gradients_of(GradientScope::data), method->gradient_purpose());
}

StepStats TrainingRun::step(const StepBatches& batches, int64_t number, double learning_rate, double max_grad_norm) {
  const StepParts parts{mesh, *model, *method, store, *optimizer, *reducer};
  return train_step(parts, batches, number, {learning_rate * method->learning_rate_scale(number), max_grad_norm, seed});
}

double accumulate(TrainingRun& run, const StepBatches& batches) {
  double loss = 0;
  for (const Batch& on_host : batches.micro_batches) {
    const Batch batch = on_host.to(run.mesh.device());
    SegmentAttention attention(batch);
    const at::Tensor h_ND = run.model->forward({batch, attention, run.mesh.tp(), true, run.seed, 1});
    const at::Tensor part =
        cross_entropy(h_ND, batch.target_rows_M, batch.targets_M, run.model->head(), run.mesh.tp()) /
        static_cast<double>(batches.num_targets);
    torch::autograd::backward({part}, {});
    loss += part.item<double>();
  }
  return loss;
}

std::string golden(const std::string& name) { return repository("tests/golden/" + name); }
std::string repository(const std::string& name) { return (std::filesystem::path(CORANK_SOURCE_DIR) / name).string(); }

TemporaryFolder::TemporaryFolder() {
  std::string pattern = (std::filesystem::temp_directory_path() / "corank-XXXXXX").string();
  path_ = mkdtemp(pattern.data());
}
TemporaryFolder::~TemporaryFolder() { std::filesystem::remove_all(path_); }

}  // namespace corank::test
