#pragma once
#include <string>
#include <vector>

#include "comm/world.h"
#include "launch/run_config.h"

namespace corank {

/// Of an environment ("NAME=value" each) the settings that all ranks must share, a line each, ordered: those of NCCL,
/// of Open MPI's transports and collectives, and of the numbers of threads and the instructions that kernels use. Not
/// what a host may have for itself: interfaces, NCCL_HOSTID, what is logged.
std::string shared_settings(const std::vector<std::string>& environment);

/// For a process that neither mpirun nor PMIx started. ConfigError if srun started it as one of several: MPI takes it
/// for a job of one rank, and each of them would do the whole run.
void require_no_peers(const World& world);

/// Collective over the world, the first thing of a command that uses ranks. DisagreeError on every rank unless all run
/// one program on the same libraries with the same command line (here without the program's name) and settings.
void require_same_start(const World& world, const std::vector<std::string>& command_line);

/// Collective over the world. read_run() on every rank. A rank that cannot read its run file is every rank's error;
/// DisagreeError where the runs differ.
RunConfig read_same_run(const std::string& path, const std::vector<std::string>& overrides, const World& world);

/// Hosts, versions of what communicates, and the settings of interfaces and of NCCL that are in force here, on one
/// line.
std::string describe_hosts(const World& world);

}  // namespace corank
