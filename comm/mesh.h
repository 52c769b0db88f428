#pragma once
#include <memory>
#include <vector>

#include "comm/communicator.h"

namespace corank {

/// A group of the mesh.
enum class Axis { world, dp, tp };

/// The ring of a group as world rank `rank` sees it, of ranks that need not be there. `hosts` by world rank: equal
/// numbers for ranks of one host. `tensor_size` divides their number.
Ring ring_of(Axis axis, const std::vector<int>& hosts, int tensor_size, int rank);

/// The world as dp x tp. Tensor-parallel ranks are neighbours (world rank = dp rank * tp size + tp rank), so that a
/// group stays inside a host. Owns its communicators.
class Mesh {
 public:
  /// Collective over the world. `tensor_size` must divide the number of ranks, else ConfigError.
  Mesh(std::unique_ptr<Communicator> world, int tensor_size);

  Communicator& world() const { return *world_; }
  Communicator& dp() const { return *dp_; }
  Communicator& tp() const { return *tp_; }
  Communicator& group(Axis axis) const;
  at::Device device() const { return world_->device(); }

 private:
  std::unique_ptr<Communicator> world_, dp_, tp_;
};

}  // namespace corank
