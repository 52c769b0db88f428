#pragma once
#include <memory>

#include "comm/communicator.h"

namespace corank {

/// The world as dp x tp. Tensor-parallel ranks are neighbours (world rank = dp rank * tp size + tp rank), so that a
/// group stays inside a host. Owns its communicators.
class Mesh {
 public:
  /// Collective over the world. `tensor_size` must divide the number of ranks, else ConfigError.
  Mesh(std::unique_ptr<Communicator> world, int tensor_size);

  Communicator& world() const { return *world_; }
  Communicator& dp() const { return *dp_; }
  Communicator& tp() const { return *tp_; }
  at::Device device() const { return world_->device(); }

 private:
  std::unique_ptr<Communicator> world_, dp_, tp_;
};

}  // namespace corank
