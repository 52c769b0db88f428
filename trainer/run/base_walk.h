#pragma once
#include <set>
#include <string>
#include <vector>

#include "trainer/models/families.h"
#include "trainer/run/traffic.h"

namespace corank {

/// Half a layer, attention or feed-forward: linears of one input, and the row-parallel one behind them.
struct HalfLayer {
  std::vector<size_t> in;  ///< indices of the shape's linears
  size_t out = 0;
  bool in_gradient = false;   ///< backward makes the gradient of the half's input
  bool out_gradient = false;  ///< and of what the last linear reads
  bool again = false;         ///< backward runs it again
};

/// The halves in order of forward. `trained`: names of linears that train; `below_trains`: the embedding does.
std::vector<HalfLayer> half_layers(const TrafficShape& shape, const std::set<std::string>& trained, bool below_trains,
                                   Checkpointing checkpointing);

/// Bytes of each gather of a weight in one micro-batch, forward and backward, on this rank. `stored`: of each linear.
std::vector<int64_t> base_gathers(const std::vector<StoredSize>& stored, const std::vector<HalfLayer>& halves,
                                  Checkpointing checkpointing);

}  // namespace corank
