#include "trainer/ops/device.h"

#include <sys/resource.h>

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

}  // namespace corank
