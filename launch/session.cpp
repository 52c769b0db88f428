#include "launch/session.h"

#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include "data/file.h"
#include "launch/adapter_files.h"
#include "trainer/files/saved_along.h"
#include "trainer/methods/config_keys.h"
#include "trainer/methods/merge_config.h"
#include "trainer/methods/start.h"

namespace corank {
namespace {

std::unique_ptr<Mesh> make_mesh(const RunConfig& run, const World& world, Ledger& ledger) {
  auto all = make_communicator(run.parallel.backend, world, ledger);
  return std::make_unique<Mesh>(std::move(all), static_cast<int>(run.parallel.tensor));
}

}  // namespace

RunConfig with_trained_adapter(RunConfig run, bool quantised) {
  if (run.adapter.path.empty()) return run;
  const auto method = make_method(run.adapter);
  if (const std::string why = method->beyond_quantised(); quantised && !why.empty()) {
    throw ConfigError(fmt::format("{}: adapter.path: {}.", run.file, why));
  }
  run.adapter = method->exchange_config();
  if (run.adapter.method == method->config().method) return run;
  for (const AdapterKey& key : adapter_keys()) {
    if (!key.of(run.adapter.method)) std::erase(run.adapter_keys, key.name);
  }
  return run;
}

SavedAdapter read_run_adapter(const RunConfig& run, Model& model) {
  SavedAdapter file = read_checked(run.adapter.path);
  place_saved_along(file, model, run.model, run.adapter.path);
  file.config = merge_with_file(run.adapter, run.adapter_keys, file.config, module_names(model));
  return file;
}

Session::Session(RunConfig run, const World& world) : run_(std::move(run)), mesh_(make_mesh(run_, world, ledger_)) {
  run_.model.device = mesh_->device();
  ModelOptions options = run_.model;
  options.residency = make_residency(run_.parallel.shard_base, mesh_->dp());
  model_ = load_model(options, mesh_->tp());
  std::optional<SavedAdapter> file;
  if (!run_.adapter.path.empty()) {
    file = read_run_adapter(run_, *model_);
    run_.adapter = file->config;
  }
  run_.adapter.fan_in_fan_out = !transposed_weights(*model_).empty();
  method_ = make_method(run_.adapter);
  start_method(*method_, *model_, store_, *mesh_, run_.model.dtype, static_cast<uint64_t>(run_.train.seed),
               file ? &*file : nullptr);
}

Inference::Inference(RunConfig run, const std::vector<NamedAdapter>& adapters, bool merged, const World& world)
    : mesh_(make_mesh(run, world, ledger_)) {
  run.model.device = mesh_->device();
  model_ = load_model(run.model, mesh_->tp());
  adapters_ = std::make_unique<AdapterSet>(*model_, *mesh_, run.model.dtype, merged);
  if (!run.adapter.path.empty()) adapters_->load("default", read_run_adapter(run, *model_));
  for (const NamedAdapter& adapter : adapters) {
    SavedAdapter file = read_checked(adapter.path);
    place_saved_along(file, *model_, run.model, adapter.path);
    adapters_->load(adapter.name, file);
  }
}

int share_cores(const World& world, bool one_thread) {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  sched_getaffinity(0, sizeof allowed, &allowed);
  const int cores = std::max(1, CPU_COUNT(&allowed));
  // mpirun may already have bound each rank to cores of its own; then all of them are this rank's.
  const bool bound =
      world.local_size() > 1 && cores * world.local_size() <= static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  const int mine = one_thread                       ? 1
                   : std::getenv("OMP_NUM_THREADS") ? at::get_num_threads()
                   : bound                          ? cores
                                                    : std::max(1, cores / world.local_size());
  const int threads = world.least(mine);
  at::set_num_threads(threads);
  return threads;
}

std::unique_ptr<GradientSum> make_gradient_sum(Session& session) {
  const ParameterStore& store = session.store();
  const TrainConfig& train = session.run().train;
  return gradient_sum(session.run().gradient_sum())
      .make(session.mesh(), {store.gradients_of(GradientScope::everywhere), store.gradients_of(GradientScope::data),
                             session.method().gradient_purpose(), train.global_batch_size / train.micro_batch_size});
}

}  // namespace corank
