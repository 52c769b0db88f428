// Faults that the main of the MPI tests must turn into failures. Never part of a passing run.
#include <gtest/gtest.h>

#include <stdexcept>

#include "comm/mpi_comm.h"
#include "tests/mpi_main.h"

namespace corank {
namespace {

bool on_last_rank() { return test_world().rank() == test_world().size() - 1; }

void barrier() { MpiComm::duplicate(test_world().comm(), "fault").barrier(); }

TEST(Fault, ThrowsOnOneRank) {
  const MpiComm comm = MpiComm::duplicate(test_world().comm(), "fault");
  if (on_last_rank()) throw std::runtime_error("planted exception");
  comm.barrier();
}

TEST(Fault, FailsOnOneRank) {
  EXPECT_FALSE(on_last_rank()) << "planted failure";
  barrier();
}

TEST(Fault, HangsOnOneRank) {
  if (!on_last_rank()) barrier();
}

}  // namespace
}  // namespace corank
