#pragma once
#include <ATen/ATen.h>

namespace corank {

/// Peak memory since reset_peak_memory(): CUDA: what the caching allocator had allocated; CPU: the process's peak
/// resident set (which cannot be reset).
int64_t peak_memory_bytes(at::Device device);
void reset_peak_memory(at::Device device);
/// Waits for everything enqueued on the device; nothing to wait for on the CPU.
void synchronize(at::Device device);

}  // namespace corank
