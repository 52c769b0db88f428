#include "comm/ring.h"

#include <algorithm>
#include <numeric>
#include <tuple>

namespace corank {

Ring::Ring(const std::vector<int>& hosts, int rank) : hosts_(hosts), ranks_(hosts.size()) {
  const auto first_of_host = [&](int r) { return std::find(hosts.begin(), hosts.end(), hosts[r]) - hosts.begin(); };
  std::iota(ranks_.begin(), ranks_.end(), 0);
  std::sort(ranks_.begin(), ranks_.end(),
            [&](int a, int b) { return std::tuple(first_of_host(a), a) > std::tuple(first_of_host(b), b); });
  position_ = static_cast<int>(std::find(ranks_.begin(), ranks_.end(), rank) - ranks_.begin());
  spans_hosts_ = std::any_of(hosts.begin(), hosts.end(), [&](int host) { return host != hosts[0]; });
  leaves_host_ = hosts[next()] != hosts[rank];
}

int Ring::rank_at(int position) const { return ranks_[(position + size()) % size()]; }

int64_t ring_part(int64_t elements, int position, int size) {
  return elements / size + (position % size < elements % size ? 1 : 0);
}

}  // namespace corank
