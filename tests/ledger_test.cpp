#include "comm/ledger.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>
#include <vector>

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

/// A ring of `size` ranks on one host.
Ring ring_of(int size, int rank) { return Ring(std::vector<int>(static_cast<size_t>(size)), rank); }

/// What a rank sends of the parts of a ring: in step s that at s + `first` places before its own.
int64_t played_ring(int64_t elements, const Ring& ring, int first) {
  int64_t sent = 0;
  for (int step = 0; step + 1 < ring.size(); ++step) {
    sent += ring_part(elements, ring.position() + 2 * ring.size() - first - step, ring.size());
  }
  return sent;
}

TEST(RingBytes, EqualThePlayedRing) {
  for (const int size : {2, 3, 4, 7, 8}) {
    for (const int64_t elements : {0, 1, 2, 5, 1000, 1001, 1006}) {
      int64_t all = 0;
      for (int rank = 0; rank < size; ++rank) {
        const Ring ring = ring_of(size, rank);
        const int64_t sent = ring_bytes({Collective::all_reduce, elements, 4}, ring);
        EXPECT_EQ(sent, 4 * (played_ring(elements, ring, 1) + played_ring(elements, ring, 0)));
        all += sent;
        EXPECT_EQ(ring_bytes({Collective::reduce_scatter, elements * size, 2}, ring), 2 * elements * (size - 1));
        EXPECT_EQ(ring_bytes({Collective::all_gather, elements, 2}, ring), 2 * elements * (size - 1));
        EXPECT_EQ(ring_bytes({Collective::barrier}, ring), 0);
        EXPECT_EQ(ring_bytes({Collective::split}, ring), 0);
      }
      EXPECT_EQ(all, 2 * (size - 1) * elements * 4);  // no byte is lost to rounding
    }
  }
}

TEST(RingBytes, ABroadcastEndsBeforeItsRoot) {
  for (const int root : {0, 1, 2}) {
    for (int rank = 0; rank < 3; ++rank) {
      const int64_t expected = rank == (root + 1) % 3 ? 0 : 70;  // from high ranks to low ones
      EXPECT_EQ(ring_bytes({Collective::broadcast, 10, 7, root}, ring_of(3, rank)), expected) << root << ' ' << rank;
    }
  }
}

TEST(RingBytes, HoldLargePayloads) {
  const int64_t terabyte = int64_t{1} << 40;
  EXPECT_EQ(ring_bytes({Collective::all_reduce, terabyte, 1}, ring_of(1024, 5)), 2 * terabyte / 1024 * 1023);
}

TEST(RingBytes, NothingIsSentInAGroupOfOne) {
  for (const Collective collective : {Collective::all_reduce, Collective::all_gather, Collective::reduce_scatter,
                                      Collective::broadcast, Collective::barrier}) {
    EXPECT_EQ(ring_bytes({collective, 64, 4}, Ring()), 0);
    EXPECT_EQ(ring_traffic({collective, 64, 4}, Ring()), Traffic{});
  }
}

// ---- Links

struct LinkCase {
  std::vector<int> hosts;   ///< by rank
  std::vector<int> order;   ///< of the ring, as each rank sends to the next
  std::vector<int> leaves;  ///< ranks that send to another host
};

const std::vector<LinkCase> kLinkCases = {
    {{0}, {0}, {}},
    {{0, 0, 0}, {2, 1, 0}, {}},
    {{0, 1}, {1, 0}, {0, 1}},
    {{0, 0, 1, 1}, {3, 2, 1, 0}, {0, 2}},
    {{0, 1, 0, 1}, {3, 1, 2, 0}, {0, 1}},  // dealt out by host: neighbours by rank are strangers
    {{7, 3, 7}, {1, 2, 0}, {0, 1}},
    {{0, 0, 1, 1, 2, 2, 2}, {6, 5, 4, 3, 2, 1, 0}, {0, 2, 4}},
};

TEST(Ring, LeavesEveryHostOnceAtItsFirstRank) {
  for (const auto& [hosts, order, leaves] : kLinkCases) {
    for (size_t place = 0; place < order.size(); ++place) {
      const Ring ring(hosts, order[place]);
      EXPECT_EQ(ring.size(), static_cast<int>(hosts.size()));
      EXPECT_EQ(ring.rank(), order[place]);
      EXPECT_EQ(ring.position(), static_cast<int>(place));
      EXPECT_EQ(ring.next(), order[(place + 1) % order.size()]);
      EXPECT_EQ(ring.previous(), order[(place + order.size() - 1) % order.size()]);
      EXPECT_EQ(ring.spans_hosts(), !leaves.empty());
      EXPECT_EQ(ring.leaves_host(), std::count(leaves.begin(), leaves.end(), order[place]) == 1) << order[place];
    }
  }
}

/// Bytes between hosts that `hosts` count together in an all_reduce of `bytes`, told of them as `told`.
int64_t between_hosts(const std::vector<int>& told, int64_t bytes) {
  int64_t all = 0;
  for (int rank = 0; rank < static_cast<int>(told.size()); ++rank) {
    all += ring_traffic({Collective::all_reduce, bytes, 1}, Ring(told, rank)).sent_between_hosts;
  }
  return all;
}

TEST(RingTraffic, CountsByLink) {
  const Transfer sum{Collective::all_reduce, 100, 4};
  EXPECT_EQ(ring_traffic(sum, Ring({0, 0}, 0)), (Traffic{1, 400, 400, 0, 0, 0}));
  EXPECT_EQ(ring_traffic({Collective::all_reduce, 0, 4}, Ring({0, 0}, 0)), Traffic{});
  EXPECT_EQ(ring_traffic(sum, Ring({0, 1}, 0)), (Traffic{1, 400, 400, 0, 400, 400}));
  EXPECT_EQ(ring_traffic(sum, Ring({0, 0, 1, 1}, 0)), (Traffic{1, 400, 600, 0, 400, 600}));
  EXPECT_EQ(ring_traffic(sum, Ring({0, 0, 1, 1}, 1)), (Traffic{1, 400, 600, 0, 400, 0}));
}

TEST(RingTraffic, CrossesAsOftenAsThereAreHosts) {
  for (const auto& [hosts, order, leaves] : kLinkCases) {
    const auto size = static_cast<int64_t>(hosts.size()), crossings = static_cast<int64_t>(leaves.size());
    EXPECT_EQ(between_hosts(hosts, 1000 * size), 2 * (size - 1) * 1000 * crossings);
  }
}

TEST(RingTraffic, ARankOnTheWrongHostIsFound) {
  EXPECT_NE(between_hosts({0, 1, 1, 1}, 4000), between_hosts({0, 0, 1, 2}, 4000));
  EXPECT_NE(between_hosts({0, 0, 0, 0}, 4000), between_hosts({0, 0, 0, 1}, 4000));
}

}  // namespace
}  // namespace corank
