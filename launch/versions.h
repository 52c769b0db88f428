#pragma once
#include <map>
#include <string>

namespace corank {

/// Version of every library that computes or stores, as this program was compiled: torch, hdf5, mpi.
std::map<std::string, std::string> library_versions();
/// The same of those that are loaded; of LibTorch what it says of itself, with the instructions it uses on this CPU.
std::map<std::string, std::string> loaded_versions();

}  // namespace corank
