#include "launch/versions.h"

#include <fmt/format.h>
#include <hdf5.h>
#include <mpi.h>
#include <torch/headeronly/version.h>

namespace corank {

std::map<std::string, std::string> library_versions() {
  return {{"torch", TORCH_VERSION},
          {"hdf5", H5_VERS_INFO},
          {"mpi", fmt::format("Open MPI {}.{}.{}", OMPI_MAJOR_VERSION, OMPI_MINOR_VERSION, OMPI_RELEASE_VERSION)},
          {"corank", CORANK_VERSION}};
}

}  // namespace corank
