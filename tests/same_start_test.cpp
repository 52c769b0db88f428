#include "launch/same_start.h"

#include <gtest/gtest.h>

namespace corank {
namespace {

TEST(SameStart, SettingsThatChangeResultsOrHangAreShared) {
  const std::vector<std::string> shared{"ATEN_CPU_CAPABILITY=avx2", "NCCL_ALGO=Ring",   "NCCL_PROTO=",
                                        "OMPI_MCA_coll=^hcoll",     "OMPI_MCA_pml=ob1", "OMP_NUM_THREADS=4"};
  std::string lines;
  for (const std::string& setting : shared) lines += (lines.empty() ? "" : "\n") + setting;
  EXPECT_EQ(shared_settings(shared), lines);
  EXPECT_EQ(shared_settings({shared.rbegin(), shared.rend()}), lines);
}

TEST(SameStart, WhatAHostHasForItselfIsNot) {
  EXPECT_EQ(shared_settings({"NCCL_SOCKET_IFNAME=eth0", "NCCL_HOSTID=a", "NCCL_DEBUG=INFO", "NCCL_DEBUG_FILE=log",
                             "NCCL_IB_HCA=mlx5", "NCCL_TOPO_FILE=t", "OMPI_MCA_btl_tcp_if_include=eth0",
                             "OMPI_MCA_orte_hnp_uri=x", "OMPI_COMM_WORLD_RANK=1", "CUDA_VISIBLE_DEVICES=3", "PATH=/bin",
                             "OMP_NUM_THREADS_OTHER=1"}),
            "");
}

}  // namespace
}  // namespace corank
