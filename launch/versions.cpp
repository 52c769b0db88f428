#include "launch/versions.h"

#include <ATen/Version.h>
#include <fmt/format.h>
#include <hdf5.h>
#include <mpi.h>
#include <torch/headeronly/version.h>

#include "comm/backends.h"

namespace corank {

std::map<std::string, std::string> library_versions() {
  return {{"torch", TORCH_VERSION},
          {"hdf5", H5_VERS_INFO},
          {"mpi", fmt::format("Open MPI {}.{}.{}", OMPI_MAJOR_VERSION, OMPI_MINOR_VERSION, OMPI_RELEASE_VERSION)},
          {"corank", CORANK_VERSION}};
}

std::map<std::string, std::string> loaded_versions() {
  unsigned major = 0, minor = 0, release = 0;
  H5get_libversion(&major, &minor, &release);
  std::map<std::string, std::string> versions = backend_versions();
  versions["HDF5"] = fmt::format("{}.{}.{}", major, minor, release);
  versions["LibTorch"] = at::show_config();
  return versions;
}

}  // namespace corank
