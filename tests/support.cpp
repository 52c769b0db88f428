#include "tests/support.h"

#include <torch/csrc/autograd/autograd.h>

#include <cstdlib>
#include <filesystem>
#include <tuple>

#ifdef CORANK_GPU_TEST
#include <c10/cuda/CUDAFunctions.h>
#else
#include "comm/mpi_communicator.h"
#endif

namespace corank::test {

namespace {

#ifdef CORANK_GPU_TEST
at::Device own_device() { return {at::kCUDA, c10::cuda::current_device()}; }
std::unique_ptr<Communicator> all_ranks(const World& world, Ledger& ledger) {
  return make_communicator("nccl", world, ledger);
}
#else
at::Device own_device() { return at::kCPU; }
std::unique_ptr<Communicator> all_ranks(const World& world, Ledger& ledger) {
  return make_mpi_communicator(world, ledger, {.host = world.rank() % 2});
}
#endif

std::unique_ptr<Communicator> checked_ranks(const World* world, Ledger& ledger) {
  auto ranks = world ? all_ranks(*world, ledger) : make_solo_communicator(own_device(), ledger);
  ranks->set_cross_check(true);
  return ranks;
}

/// Ends the groups after the last test, while MPI and CUDA are still up.
class SharedMeshes : public testing::Environment {
 public:
  SharedMesh& at(const World* world, int tensor) {
    // A process alone stays on the device that is current: the first group of several ranks changes it.
    const int device = world ? -1 : own_device().index();
    std::unique_ptr<SharedMesh>& mesh = meshes_[{world, tensor, device}];
    if (!mesh) mesh = std::make_unique<SharedMesh>(world, tensor);
    return *mesh;
  }
  void TearDown() override { meshes_.clear(); }

 private:
  std::map<std::tuple<const World*, int, int>, std::unique_ptr<SharedMesh>> meshes_;
};

// GoogleTest owns it.
SharedMeshes& meshes = static_cast<SharedMeshes&>(*testing::AddGlobalTestEnvironment(new SharedMeshes));

}  // namespace

SharedMesh::SharedMesh(const World* world, int tensor) : mesh(checked_ranks(world, ledger), tensor) {}

SharedMesh& shared_mesh(const World* world, int tensor) { return meshes.at(world, tensor); }

void set_cross_check(const Mesh& mesh, bool on) {
  for (Communicator* group : {&mesh.world(), &mesh.dp(), &mesh.tp()}) group->set_cross_check(on);
}

double relative_error(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.to(at::kCPU, at::kDouble), y = b.to(at::kCPU, at::kDouble);
  const double difference = at::linalg_vector_norm(x - y).item<double>(),
               size = at::linalg_vector_norm(y).item<double>();
  return difference == 0 ? 0 : difference / size;
}

TrainingRun::TrainingRun(const World* world, int tensor, ModelOptions options, const AdapterConfig& adapter,
                         OptimizerOptions optimizer_options, uint64_t seed, const SavedAdapter* file)
    : ledger(shared_mesh(world, tensor).ledger), mesh(shared_mesh(world, tensor).mesh), dropout(seed, mesh.device()) {
  options.device = mesh.device();
  model = load_model(options, mesh.tp());
  method = make_method(adapter);
  start_method(*method, *model, store, mesh, options.dtype, seed, file);
  optimizer = std::make_unique<Optimizer>(store, optimizer_options);
  reducer = std::make_unique<GradReducer>(mesh, store.gradients_of(GradientScope::everywhere),
                                          store.gradients_of(GradientScope::data), method->gradient_purpose());
}

StepStats TrainingRun::step(const StepBatches& batches, int64_t number, double learning_rate, double max_grad_norm) {
  return train_step(parts(), batches, number, {learning_rate * method->learning_rate_scale(number), max_grad_norm});
}

double accumulate(TrainingRun& run, const StepBatches& batches) {
  double loss = 0;
  run.dropout.begin(1);
  for (const Batch& on_host : batches.micro_batches) {
    const Batch batch = on_host.to(run.mesh.device());
    SegmentAttention attention(batch);
    const at::Tensor h_ND = run.model->forward({batch, attention, run.mesh.tp(), &run.dropout});
    const at::Tensor part =
        cross_entropy(h_ND, batch.target_rows_M, batch.targets_M, run.model->head(), run.mesh.tp()) /
        static_cast<double>(batches.num_targets);
    torch::autograd::backward({part}, {});
    loss += part.item<double>();
  }
  return loss;
}

Ledger::Snapshot difference(const Ledger::Snapshot& now, const Ledger::Snapshot& before) {
  Ledger::Snapshot result;
  for (int p = 0; p < kNumPurposes; ++p) result[p] = now[p] - before[p];
  return result;
}

Ledger::Snapshot predicted_bytes(const TrainingRun& run, const ModelOptions& model, const AdapterConfig& adapter,
                                 const StepBatches& batches, int64_t step, bool asked) {
  std::vector<BatchSize> sizes;
  for (const Batch& batch : batches.micro_batches) sizes.push_back({batch.num_tokens(), batch.num_targets()});
  auto collectives =
      predict_step(traffic_shape(*run.model, adapter), adapter, run.mesh.tp().size(), run.mesh.dp().size(),
                   static_cast<int>(at::elementSize(model.dtype)), model.checkpointing, sizes, step);
  if (!asked) {
    std::erase_if(collectives, [](const StepCollective& one) {
      return one.purpose == Purpose::data_control && one.axis == Axis::world;
    });
  }
  return traffic_by_purpose(collectives, [&](Axis axis) { return run.mesh.group(axis).ring(); });
}

void expect_bytes(const Ledger::Snapshot& counted, const Ledger::Snapshot& predicted, const std::string& what) {
  for (int p = 0; p < kNumPurposes; ++p) {
    SCOPED_TRACE(std::string(name(static_cast<Purpose>(p))) + ' ' + what);
    EXPECT_EQ(counted[p].calls, predicted[p].calls);
    for (const Link link : kLinks) {
      EXPECT_EQ(counted[p].over(link).payload, predicted[p].over(link).payload) << name(link);
      EXPECT_EQ(counted[p].over(link).sent, predicted[p].over(link).sent) << name(link);
    }
  }
}

std::vector<std::string> unequal_replicas(const Mesh& mesh, const ParameterStore& store) {
  std::vector<std::string> names;
  for (const bool whole : {true, false}) {
    std::vector<at::Tensor> bits;
    std::vector<std::string> held;
    for (const auto& parameter : store.parameters()) {
      if (parameter.spec.share || parameter.spec.shard.whole() != whole) continue;
      bits.push_back(parameter.master.contiguous().view(at::kInt).flatten());
      held.push_back(parameter.spec.name);
    }
    if (bits.empty()) continue;
    Communicator& group = whole ? mesh.world() : mesh.dp();
    const at::Tensor high = at::cat(bits), low = high.clone();
    group.all_reduce(high, ReduceOp::max, Purpose::startup);
    group.all_reduce(low, ReduceOp::min, Purpose::startup);
    const at::Tensor unequal = (high != low).to(at::kCPU);
    int64_t begin = 0;
    for (size_t i = 0; i < bits.size(); begin += bits[i++].numel()) {
      if (unequal.narrow(0, begin, bits[i].numel()).any().item<bool>()) names.push_back(held[i]);
    }
  }
  return names;
}

std::string golden(const std::string& name) { return repository("tests/golden/" + name); }
std::string repository(const std::string& name) { return (std::filesystem::path(CORANK_SOURCE_DIR) / name).string(); }

TemporaryFolder::TemporaryFolder() {
  std::string pattern = (std::filesystem::temp_directory_path() / "corank-XXXXXX").string();
  path_ = mkdtemp(pattern.data());
}
TemporaryFolder::~TemporaryFolder() { std::filesystem::remove_all(path_); }

SharedFolder::SharedFolder(const World& world) : world_(world) {
  if (world.rank() == 0) folder_ = std::make_unique<TemporaryFolder>();
  std::string name = folder_ ? folder_->path() : "";
  name.resize(4096);
  MPI_Bcast(name.data(), static_cast<int>(name.size()), MPI_CHAR, 0, world.comm());
  path_ = name.c_str();
}
SharedFolder::~SharedFolder() { MPI_Barrier(world_.comm()); }

}  // namespace corank::test
