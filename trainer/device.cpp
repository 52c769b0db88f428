#include "trainer/device.h"

#include <fmt/format.h>
#include <hdf5.h>
#include <mpi.h>
#include <sys/resource.h>
#include <torch/headeronly/version.h>

#include "trainer/ops/cuda.h"

namespace corank {

int64_t peak_memory_bytes(at::Device device) {
  if (device.is_cuda()) return ops::cuda::peak_memory_bytes();
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{1024} * usage.ru_maxrss;
}

void reset_peak_memory(at::Device device) {
  if (device.is_cuda()) ops::cuda::reset_peak_memory();
}

void synchronize(at::Device device) {
  if (device.is_cuda()) ops::cuda::synchronize();
}

std::map<std::string, std::string> library_versions() {
  return {{"torch", TORCH_VERSION},
          {"hdf5", H5_VERS_INFO},
          {"mpi", fmt::format("Open MPI {}.{}.{}", OMPI_MAJOR_VERSION, OMPI_MINOR_VERSION, OMPI_RELEASE_VERSION)},
          {"corank", CORANK_VERSION}};
}

}  // namespace corank
