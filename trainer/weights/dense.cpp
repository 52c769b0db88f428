#include "trainer/weights/formats.h"

namespace corank {
namespace {

/// The weight as it is, in the compute dtype.
class DenseWeight : public FrozenWeight {
 public:
  DenseWeight(const at::Tensor& w_OI, WeightPlace place) : FrozenWeight(std::move(place)) {
    place_.room_OI = at::Tensor();  // a weight that takes this one's place frees it
    keep({w_OI});
  }
  DenseWeight(const at::Tensor& values, at::IntArrayRef shape, WeightPlace place) : FrozenWeight(std::move(place)) {
    place_.room_OI = at::Tensor();
    keep_trained(values, shape);
  }

 private:
  at::Tensor unpack(Pass pass) const override { return stored(pass)[0]; }
};

}  // namespace

std::unique_ptr<FrozenWeight> make_dense_weight(const FormatOptions& options, const StoredWeight& stored,
                                                const Shard& shard, const WeightPlace& place) {
  const at::Tensor w_OI = stored.read(shard).to(options.device, options.dtype).contiguous();
  if (!place.room_OI.defined()) return std::make_unique<DenseWeight>(w_OI, place);
  place.room_OI.copy_(w_OI);
  return std::make_unique<DenseWeight>(place.room_OI, place);
}

std::unique_ptr<FrozenWeight> make_trained_weight(const at::Tensor& values, at::IntArrayRef shape, WeightPlace place) {
  return std::make_unique<DenseWeight>(values, shape, std::move(place));
}

}  // namespace corank
