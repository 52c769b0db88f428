#include "comm/mesh.h"

#include "configs/error.h"

namespace corank {
namespace {

std::string divisors(int number) {
  std::string result;
  for (int i = 1; i <= number; ++i) {
    if (number % i == 0) result += (result.empty() ? "" : ", ") + std::to_string(i);
  }
  return result;
}

void require_divisor(int tensor_size, int ranks) {
  if (tensor_size > 0 && ranks % tensor_size == 0) return;
  throw ConfigError("parallel.tensor: " + std::to_string(tensor_size) +
                    " does not divide the number of ranks, which is " + std::to_string(ranks) +
                    ". Allowed: " + divisors(ranks) + ".");
}

/// Ranks of equal color are one group.
int color_of(Axis axis, int rank, int tensor_size) {
  switch (axis) {
    case Axis::world:
      return 0;
    case Axis::dp:
      return rank % tensor_size;
    case Axis::tp:
      return rank / tensor_size;
  }
  throw InternalError("Unknown axis.");
}

}  // namespace

Ring ring_of(Axis axis, const std::vector<int>& hosts, int tensor_size, int rank) {
  std::vector<int> members;
  int place = 0;
  for (int other = 0; other < static_cast<int>(hosts.size()); ++other) {
    if (color_of(axis, other, tensor_size) != color_of(axis, rank, tensor_size)) continue;
    if (other == rank) place = static_cast<int>(members.size());
    members.push_back(hosts[other]);
  }
  return {members, place};
}

Mesh::Mesh(std::unique_ptr<Communicator> world, int tensor_size) : world_(std::move(world)) {
  require_divisor(tensor_size, world_->size());
  dp_ = world_->split(color_of(Axis::dp, world_->rank(), tensor_size), "dp");
  tp_ = world_->split(color_of(Axis::tp, world_->rank(), tensor_size), "tp");
}

Communicator& Mesh::group(Axis axis) const {
  switch (axis) {
    case Axis::world:
      return world();
    case Axis::dp:
      return dp();
    case Axis::tp:
      return tp();
  }
  throw InternalError("Unknown axis.");
}

}  // namespace corank
