#include "trainer/weights/residency.h"

#include <array>

#include "configs/error.h"
#include "trainer/weights/sharded.h"

namespace corank {
namespace {

class ResidentBytes : public StoredBytes {
 public:
  explicit ResidentBytes(std::vector<at::Tensor> tensors) : tensors_(std::move(tensors)) {}
  std::vector<at::Tensor> on_device(Pass) const override { return tensors_; }
  int64_t device_bytes() const override {
    int64_t bytes = 0;
    for (const at::Tensor& tensor : tensors_) bytes += static_cast<int64_t>(tensor.defined() ? tensor.nbytes() : 0);
    return bytes;
  }

 private:
  std::vector<at::Tensor> tensors_;
};

class Resident : public Residency {
 public:
  std::unique_ptr<StoredBytes> keep(int64_t, std::vector<at::Tensor> tensors) override {
    return std::make_unique<ResidentBytes>(std::move(tensors));
  }
  std::unique_ptr<StoredBytes> keep_trained(int64_t, const at::Tensor& values, at::IntArrayRef shape) override {
    return std::make_unique<ResidentBytes>(std::vector<at::Tensor>{values.view(shape)});
  }
  at::Tensor shared_room(at::IntArrayRef shape, const at::TensorOptions& options) override {
    return at::empty(shape, options);
  }
};

struct ShardBase {
  const char* name;
  std::shared_ptr<Residency> (*make)(Communicator& dp);
};

constexpr std::array kShardBases{
    ShardBase{"none", [](Communicator&) { return resident(); }},
    ShardBase{"dp", [](Communicator& dp) { return sharded_over(dp.split(0, "base")); }},
};

}  // namespace

std::shared_ptr<Residency> resident() { return std::make_shared<Resident>(); }

std::vector<std::string> shard_base_names() {
  std::vector<std::string> names;
  for (const ShardBase& one : kShardBases) names.emplace_back(one.name);
  return names;
}

std::shared_ptr<Residency> make_residency(const std::string& shard_base, Communicator& dp) {
  for (const ShardBase& one : kShardBases) {
    if (shard_base == one.name) return dp.size() > 1 ? one.make(dp) : resident();
  }
  throw InternalError("parallel.shard_base: no residency is named " + shard_base + ".");
}

}  // namespace corank
