#include "comm/backends.h"

#include <algorithm>

#include "comm/mpi_communicator.h"
#include "configs/error.h"
#ifdef CORANK_HAS_CUDA
#include "comm/nccl_communicator.h"
#endif

namespace corank {
namespace {

struct Backend {
  std::string name;
  std::unique_ptr<Communicator> (*make)(const World&, Ledger&);
};

std::unique_ptr<Communicator> make_mpi(const World& world, Ledger& ledger) {
  return make_mpi_communicator(world, ledger);
}

/// The last one is the default.
std::vector<Backend> backends() {
  return {
      {"mpi", make_mpi},
#ifdef CORANK_HAS_CUDA
      {"nccl", make_nccl_communicator},
#endif
  };
}

std::string joined_names() {
  std::string result;
  for (const std::string& name : backend_names()) result += (result.empty() ? "" : ", ") + name;
  return result;
}

}  // namespace

std::vector<std::string> backend_names() {
  std::vector<std::string> names;
  for (const Backend& backend : backends()) names.push_back(backend.name);
  return names;
}

std::string default_backend() { return backends().back().name; }

std::map<std::string, std::string> backend_versions() {
  return {{"MPI", mpi_version()},
#ifdef CORANK_HAS_CUDA
          {"NCCL", nccl_version()}
#endif
  };
}

std::unique_ptr<Communicator> make_communicator(const std::string& backend, const World& world, Ledger& ledger) {
  const std::vector<Backend> all = backends();
  const auto found = std::find_if(all.begin(), all.end(), [&](const Backend& b) { return b.name == backend; });
  if (found == all.end()) {
    throw ConfigError("parallel.backend: \"" + backend + "\" is not in this build, which has: " + joined_names() +
                      ". nccl needs a build with CORANK_CUDA=ON.");
  }
  return found->make(world, ledger);
}

}  // namespace corank
