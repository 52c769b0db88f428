#pragma once
#include <mpi.h>

#include <map>
#include <string>
#include <vector>

namespace corank {

/// This process's place among the processes that mpirun started. Owns MPI from construction to finish(). Exactly one
/// per process. A World destroyed without finish() leaves MPI as it is: after an exception MPI_Finalize would wait for
/// peers that never come, so main() decides between finish() and abort().
class World {
 public:
  /// Starts MPI (thread level FUNNELED: one thread calls MPI). Throws CommError if MPI cannot give that level.
  World(int* argc, char*** argv);
  ~World() = default;
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  /// Place among, and number of, the ranks on this host.
  int local_rank() const { return local_rank_; }
  int local_size() const { return local_size_; }
  /// The first rank on this host: a number that its ranks share.
  int host() const { return host_; }
  /// Number of hosts.
  int hosts() const { return hosts_; }
  MPI_Comm comm() const { return MPI_COMM_WORLD; }

  /// Collective. The least `value` of all ranks.
  int least(int value) const;
  /// Collective. Ends MPI after a successful run.
  void finish();
  /// Ends the whole job at once with `code`.
  [[noreturn]] static void abort(int code);

 private:
  int rank_ = 0, size_ = 1, local_rank_ = 0, local_size_ = 1, host_ = 0, hosts_ = 1;
};

/// Name of this host; in a container that of the container.
std::string host_name();
/// "Open MPI v4.1.4": of the library that is loaded.
std::string mpi_version();
/// The values in force of parameters of Open MPI that are texts ("btl_tcp_if_include"), whoever set them, by name;
/// empty: none, or no such parameter. Costs some 12 ms, whatever their number.
std::map<std::string, std::string> mpi_settings(const std::vector<std::string>& names);
/// True if mpirun (or srun with PMIx) started this process.
bool started_by_mpi();
/// What Open MPI says, before MPI is started, of this process among those that it started; 0 of 1 where it says
/// nothing.
struct StartedPlace {
  int rank = 0, size = 1;
};
StartedPlace started_place();

}  // namespace corank
