#pragma once
#include <map>
#include <string>

namespace corank {

/// Version of every library that computes or stores: torch, hdf5, mpi, with CUDA also cuda and nccl.
std::map<std::string, std::string> library_versions();

}  // namespace corank
