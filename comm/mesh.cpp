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

}  // namespace

Mesh::Mesh(std::unique_ptr<Communicator> world, int tensor_size) : world_(std::move(world)) {
  require_divisor(tensor_size, world_->size());
  dp_ = world_->split(world_->rank() % tensor_size, "dp");
  tp_ = world_->split(world_->rank() / tensor_size, "tp");
}

}  // namespace corank
