#pragma once
#include <cstdint>
#include <vector>

namespace corank {

/// The order in which the ranks of a group pass bytes on, seen from one of them. Ranks of one host are neighbours, so
/// that the ring leaves each host once. It runs from high ranks to low ones: the first rank of a host is the one that
/// sends to another host, so what rank 0 counts is what leaves its host in its groups.
class Ring {
 public:
  /// A rank alone.
  Ring() : Ring(std::vector<int>{0}, 0) {}
  /// `hosts` by rank: equal numbers for ranks of one host.
  Ring(const std::vector<int>& hosts, int rank);

  /// As given.
  const std::vector<int>& hosts() const { return hosts_; }
  int size() const { return static_cast<int>(ranks_.size()); }
  int rank() const { return rank_at(position_); }
  /// This rank's place in the order.
  int position() const { return position_; }
  /// The rank at a place, counted around.
  int rank_at(int position) const;
  /// Whom this rank sends to.
  int next() const { return rank_at(position_ + 1); }
  /// Whom this rank receives from.
  int previous() const { return rank_at(position_ - 1); }

  bool operator==(const Ring&) const = default;

  bool spans_hosts() const { return spans_hosts_; }
  /// Whether next() is on another host.
  bool leaves_host() const { return leaves_host_; }

 private:
  std::vector<int> hosts_, ranks_;
  int position_ = 0;
  bool spans_hosts_ = false, leaves_host_ = false;
};

/// Elements in the part of a tensor that belongs to a place of a ring of `size` ranks: all parts are equally long, but
/// for one element more in the first ones.
int64_t ring_part(int64_t elements, int position, int size);

}  // namespace corank
