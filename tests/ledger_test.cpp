#include "comm/ledger.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

namespace corank {
namespace {

TEST(Ledger, StartsAtZero) {
  const Ledger ledger;
  for (const Traffic& traffic : ledger.snapshot()) EXPECT_EQ(traffic, Traffic{});
  EXPECT_FALSE(ledger.timing());
}

TEST(Ledger, AddsUnderItsPurposeOnly) {
  Ledger ledger;
  ledger.record(Purpose::checkpoint, {1, 100, 150, 0.5});
  ledger.record(Purpose::checkpoint, {2, 10, 20, 0.25});
  EXPECT_EQ(ledger.at(Purpose::checkpoint), (Traffic{3, 110, 170, 0.75}));
  for (int i = 0; i < kNumPurposes; ++i) {
    const auto purpose = static_cast<Purpose>(i);
    if (purpose != Purpose::checkpoint) {
      EXPECT_EQ(ledger.at(purpose), Traffic{});
    }
  }
}

TEST(Ledger, SnapshotsSubtract) {
  Ledger ledger;
  ledger.record(Purpose::startup, {1, 8, 8, 1.0});
  const Ledger::Snapshot before = ledger.snapshot();
  ledger.record(Purpose::startup, {2, 5, 7, 0.5});
  const auto i = static_cast<size_t>(Purpose::startup);
  EXPECT_EQ(ledger.snapshot()[i] - before[i], (Traffic{2, 5, 7, 0.5}));
  EXPECT_EQ(before[i], (Traffic{1, 8, 8, 1.0}));
}

TEST(Ledger, EveryPurposeHasItsOwnName) {
  std::set<std::string> names;
  for (int i = 0; i < kNumPurposes; ++i) names.emplace(name(static_cast<Purpose>(i)));
  EXPECT_EQ(names.size(), static_cast<size_t>(kNumPurposes));
  EXPECT_EQ(names.count("unknown"), 0u);
  EXPECT_EQ(name(Purpose::adapter_gradients), "adapter-gradients");
  EXPECT_EQ(name(static_cast<Purpose>(kNumPurposes)), "unknown");  // kNumPurposes counts them all
}

TEST(Ledger, EveryCollectiveHasItsOwnName) {
  EXPECT_EQ(name(Collective::all_reduce), "all_reduce");
  EXPECT_EQ(name(Collective::all_gather), "all_gather");
  EXPECT_EQ(name(Collective::reduce_scatter), "reduce_scatter");
  EXPECT_EQ(name(Collective::broadcast), "broadcast");
  EXPECT_EQ(name(Collective::barrier), "barrier");
  EXPECT_EQ(name(Collective::split), "split");
}

// What each rank sends when the ring algorithm is played step by step, with blocks of `payload / size` bytes.
int64_t played_ring(int64_t payload, int size, int phases) {
  int64_t sent = 0;
  for (int phase = 0; phase < phases; ++phase) {
    for (int step = 1; step < size; ++step) sent += payload / size;
  }
  return sent;
}

TEST(RingBytes, EqualThePlayedRing) {
  for (const int size : {2, 3, 4, 7, 8}) {
    const int64_t payload = 1000 * size;
    EXPECT_EQ(ring_bytes(Collective::reduce_scatter, payload, size), played_ring(payload, size, 1));
    EXPECT_EQ(ring_bytes(Collective::all_reduce, payload, size), played_ring(payload, size, 2));
    EXPECT_EQ(ring_bytes(Collective::all_gather, payload, size), played_ring(payload * size, size, 1));
    EXPECT_EQ(ring_bytes(Collective::broadcast, payload, size), payload);
    EXPECT_EQ(ring_bytes(Collective::barrier, payload, size), 0);
    EXPECT_EQ(ring_bytes(Collective::split, payload, size), 0);
  }
}

TEST(RingBytes, DropFractions) {
  EXPECT_EQ(ring_bytes(Collective::all_reduce, 4, 3), 5);  // 16 / 3
  EXPECT_EQ(ring_bytes(Collective::all_reduce, 0, 3), 0);
}

TEST(RingBytes, HoldLargePayloads) {
  const int64_t terabyte = int64_t{1} << 40;
  EXPECT_EQ(ring_bytes(Collective::all_reduce, terabyte, 1024), 2 * terabyte / 1024 * 1023);
}

TEST(RingBytes, NothingIsSentInAGroupOfOne) {
  for (const Collective collective : {Collective::all_reduce, Collective::all_gather, Collective::reduce_scatter,
                                      Collective::broadcast, Collective::barrier}) {
    EXPECT_EQ(ring_bytes(collective, 64, 1), 0);
  }
}

}  // namespace
}  // namespace corank
