#include "comm/world.h"

#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>

#include "configs/error.h"

namespace corank {
namespace {

void check(int code, const char* operation) {
  if (code == MPI_SUCCESS) return;
  std::array<char, MPI_MAX_ERROR_STRING> text{};
  int length = 0;
  MPI_Error_string(code, text.data(), &length);
  throw CommError(std::string(operation) + " failed: " + text.data() + ".");
}

bool running() {
  int initialized = 0, finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  return initialized && !finalized;
}

/// Within MPI_T_init_thread and MPI_T_finalize.
std::string setting_in_force(const std::string& name) {
  int index = 0, count = 0;
  MPI_T_cvar_handle handle = MPI_T_CVAR_HANDLE_NULL;
  if (MPI_T_cvar_get_index(name.c_str(), &index) != MPI_SUCCESS) return "";
  if (MPI_T_cvar_handle_alloc(index, nullptr, &handle, &count) != MPI_SUCCESS) return "";
  std::string text(static_cast<size_t>(count) + 1, '\0');
  const bool read = MPI_T_cvar_read(handle, text.data()) == MPI_SUCCESS;
  MPI_T_cvar_handle_free(&handle);
  return read ? text.c_str() : "";
}

}  // namespace

World::World(int* argc, char*** argv) {
  int initialized = 0;
  MPI_Initialized(&initialized);
  if (initialized) throw InternalError("MPI is started already; a process has exactly one World.");
  int level = 0;
  check(MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &level), "MPI_Init_thread");
  if (level < MPI_THREAD_FUNNELED) {
    throw CommError(
        "This MPI library gives no thread level FUNNELED, which a process with threads needs. Use another.");
  }
  check(MPI_Comm_rank(MPI_COMM_WORLD, &rank_), "MPI_Comm_rank");
  check(MPI_Comm_size(MPI_COMM_WORLD, &size_), "MPI_Comm_size");
  MPI_Comm host = MPI_COMM_NULL;
  check(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank_, MPI_INFO_NULL, &host), "MPI_Comm_split_type");
  check(MPI_Comm_rank(host, &local_rank_), "MPI_Comm_rank");
  check(MPI_Comm_size(host, &local_size_), "MPI_Comm_size");
  host_ = rank_;
  check(MPI_Bcast(&host_, 1, MPI_INT, 0, host), "MPI_Bcast");
  check(MPI_Comm_free(&host), "MPI_Comm_free");
  hosts_ = local_rank_ == 0 ? 1 : 0;
  check(MPI_Allreduce(MPI_IN_PLACE, &hosts_, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD), "MPI_Allreduce");
}

int World::least(int value) const {
  check(MPI_Allreduce(MPI_IN_PLACE, &value, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD), "MPI_Allreduce");
  return value;
}

void World::finish() { check(MPI_Finalize(), "MPI_Finalize"); }

void World::abort(int code) {
  std::cout.flush();
  std::fflush(nullptr);
  if (running()) MPI_Abort(MPI_COMM_WORLD, code);
  std::_Exit(code);
}

std::string host_name() {
  std::array<char, 256> name{};
  gethostname(name.data(), name.size() - 1);
  return name.data();
}

std::string mpi_version() {
  std::array<char, MPI_MAX_LIBRARY_VERSION_STRING> text{};
  int length = 0;
  check(MPI_Get_library_version(text.data(), &length), "MPI_Get_library_version");
  const std::string version = text.data();
  return version.substr(0, version.find(','));
}

std::map<std::string, std::string> mpi_settings(const std::vector<std::string>& names) {
  int level = 0;
  check(MPI_T_init_thread(MPI_THREAD_SINGLE, &level), "MPI_T_init_thread");
  std::map<std::string, std::string> values;
  for (const std::string& name : names) values[name] = setting_in_force(name);
  check(MPI_T_finalize(), "MPI_T_finalize");
  return values;
}

bool started_by_mpi() { return std::getenv("OMPI_COMM_WORLD_RANK") != nullptr || std::getenv("PMIX_RANK") != nullptr; }

StartedPlace started_place() {
  const char *rank = std::getenv("OMPI_COMM_WORLD_RANK"), *size = std::getenv("OMPI_COMM_WORLD_SIZE");
  return rank && size ? StartedPlace{std::atoi(rank), std::atoi(size)} : StartedPlace();
}

}  // namespace corank
