#include "launch/session.h"

#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include "data/file.h"
#include "trainer/adapter/start.h"
#include "trainer/agree.h"

namespace corank {
namespace {

std::unique_ptr<Mesh> make_mesh(const RunConfig& run, const World& world, Ledger& ledger) {
  auto all = make_communicator(run.parallel.backend, world, ledger);
  return std::make_unique<Mesh>(std::move(all), static_cast<int>(run.parallel.tensor));
}

std::vector<std::string> linear_names(Model& model) {
  std::vector<std::string> names;
  for (const AdaptedLinear* linear : model.linears()) names.push_back(linear->name());
  return names;
}

}  // namespace

Session::Session(RunConfig run, const World& world) : run_(std::move(run)), mesh_(make_mesh(run_, world, ledger_)) {
  require_equal(mesh_->world(), run_.yaml(), "the run (run file and overrides)");
  run_.model.device = mesh_->device();
  model_ = load_model(run_.model, mesh_->tp());
  std::optional<AdapterFile> file;
  if (!run_.adapter.path.empty()) {
    file = read_adapter(run_.adapter.path);
    check_adapter(*file, run_.adapter.path);
    run_.adapter = merge_with_file(run_.adapter, run_.adapter_keys, file->config, linear_names(*model_));
  }
  run_.adapter.fan_in_fan_out = !transposed_weights(*model_).empty();
  method_ = make_method(run_.adapter);
  start_method(*method_, *model_, store_, *mesh_, run_.model.dtype, static_cast<uint64_t>(run_.train.seed),
               file ? &*file : nullptr);
}

int share_cores(const World& world) {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  sched_getaffinity(0, sizeof allowed, &allowed);
  const int cores = std::max(1, CPU_COUNT(&allowed));
  // mpirun may already have bound each rank to cores of its own; then all of them are this rank's.
  const bool bound =
      world.local_size() > 1 && cores * world.local_size() <= static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  const int threads = std::getenv("OMP_NUM_THREADS") ? at::get_num_threads()
                      : bound                        ? cores
                                                     : std::max(1, cores / world.local_size());
  at::set_num_threads(threads);
  return threads;
}

}  // namespace corank
