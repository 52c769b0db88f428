#pragma once
#include <mpi.h>

#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "comm/ring.h"

namespace corank {

/// Owns one MPI communicator whose errors become CommError. What the backends share over the host: barrier, split,
/// comparison and the exchange of small values.
class MpiComm {
 public:
  /// Collective over `comm`.
  static MpiComm duplicate(MPI_Comm comm, const std::string& axis);
  /// Collective. Ranks of equal `color` form a group, ordered by rank.
  MpiComm split(int color, const std::string& axis) const;

  MpiComm(MpiComm&& other) noexcept
      : comm_(std::exchange(other.comm_, MPI_COMM_NULL)), axis_(other.axis_), rank_(other.rank_), size_(other.size_) {}
  MpiComm& operator=(MpiComm&&) = delete;
  ~MpiComm();

  MPI_Comm get() const { return comm_; }
  int rank() const { return rank_; }
  int size() const { return size_; }
  const std::string& axis() const { return axis_; }

  /// Throws CommError naming the operation, the group and the rank, unless `code` is MPI_SUCCESS.
  void check(int code, const char* operation) const;

  /// Collective.
  void barrier() const;
  /// Collective. The smallest and the largest of `value` over the ranks.
  std::pair<int64_t, int64_t> min_max(int64_t value) const;
  /// Collective. Every rank receives `root`'s value.
  template <class T>
  void broadcast(T& value, int root) const {
    static_assert(std::is_trivially_copyable_v<T>);
    check(MPI_Bcast(&value, sizeof(T), MPI_BYTE, root, comm_), "MPI_Bcast");
  }
  /// Collective. Every rank's value, in rank order.
  template <class T>
  std::vector<T> all_gather(const T& value) const {
    static_assert(std::is_trivially_copyable_v<T>);
    std::vector<T> all(static_cast<size_t>(size_));
    check(MPI_Allgather(&value, sizeof(T), MPI_BYTE, all.data(), sizeof(T), MPI_BYTE, comm_), "MPI_Allgather");
    return all;
  }

  /// Collective. The ring of this group. `host`: a number that ranks of one host share.
  Ring ring(int host) const { return {all_gather(host), rank_}; }

 private:
  /// Takes ownership of `comm`.
  MpiComm(MPI_Comm comm, const std::string& axis);

  MPI_Comm comm_;
  std::string axis_;
  int rank_ = 0, size_ = 1;
};

}  // namespace corank
