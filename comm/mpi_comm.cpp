#include "comm/mpi_comm.h"

#include <c10/util/Exception.h>

#include <array>

#include "configs/error.h"

namespace corank {
namespace {

std::string error_text(int code) {
  std::array<char, MPI_MAX_ERROR_STRING> text{};
  int length = 0;
  MPI_Error_string(code, text.data(), &length);
  return {text.data(), static_cast<size_t>(length)};
}

}  // namespace

MpiComm::MpiComm(MPI_Comm comm, const std::string& axis) : comm_(comm), axis_(axis) {
  check(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  check(MPI_Comm_rank(comm_, &rank_), "MPI_Comm_rank");
  check(MPI_Comm_size(comm_, &size_), "MPI_Comm_size");
}

MpiComm MpiComm::duplicate(MPI_Comm comm, const std::string& axis) {
  MPI_Comm copy = MPI_COMM_NULL;
  const int code = MPI_Comm_dup(comm, &copy);
  if (code != MPI_SUCCESS) throw CommError("MPI_Comm_dup for " + axis + " failed: " + error_text(code) + ".");
  return {copy, axis};
}

MpiComm MpiComm::split(int color, const std::string& axis) const {
  MPI_Comm group = MPI_COMM_NULL;
  check(MPI_Comm_split(comm_, color, rank_, &group), "MPI_Comm_split");
  return {group, axis};
}

MpiComm::~MpiComm() {
  if (comm_ == MPI_COMM_NULL) return;
  int finalized = 0;
  MPI_Finalized(&finalized);
  if (finalized) return;
  const int code = MPI_Comm_free(&comm_);
  if (code != MPI_SUCCESS) TORCH_WARN("MPI_Comm_free of ", axis_, " on rank ", rank_, ": ", error_text(code));
}

void MpiComm::check(int code, const char* operation) const {
  if (code == MPI_SUCCESS) return;
  throw CommError(std::string(operation) + " over " + axis_ + " failed on rank " + std::to_string(rank_) + " of " +
                  std::to_string(size_) + ": " + error_text(code) +
                  ". A peer or the network failed; start the same command again.");
}

void MpiComm::barrier() const { check(MPI_Barrier(comm_), "MPI_Barrier"); }

std::pair<int64_t, int64_t> MpiComm::min_max(int64_t value) const {
  int64_t low = 0, high = 0;
  check(MPI_Allreduce(&value, &low, 1, MPI_INT64_T, MPI_MIN, comm_), "MPI_Allreduce");
  check(MPI_Allreduce(&value, &high, 1, MPI_INT64_T, MPI_MAX, comm_), "MPI_Allreduce");
  return {low, high};
}

}  // namespace corank
