#include "trainer/weights/formats.h"

namespace corank {
namespace {

/// The weight as it is, in the compute dtype.
class DenseWeight : public FrozenWeight {
 public:
  DenseWeight(const at::Tensor& w_OI, WeightPlace place) : place_(std::move(place)) {
    place_.room_OI = at::Tensor();  // a weight that takes this one's place frees it
    replace(w_OI);
  }
  void replace(const at::Tensor& w_OI) override { bytes_ = place_.residency->keep(place_.order, {w_OI}); }
  int64_t bytes() const override { return bytes_->device_bytes(); }

 private:
  at::Tensor unpack(Pass pass) const override { return bytes_->on_device(pass)[0]; }

  WeightPlace place_;
  std::unique_ptr<StoredBytes> bytes_;
};

}  // namespace

std::unique_ptr<FrozenWeight> make_dense_weight(const FormatOptions& options, const StoredWeight& stored,
                                                const Shard& shard, const WeightPlace& place) {
  const at::Tensor w_OI = stored.read(shard).to(options.device, options.dtype).contiguous();
  if (!place.room_OI.defined()) return std::make_unique<DenseWeight>(w_OI, place);
  place.room_OI.copy_(w_OI);
  return std::make_unique<DenseWeight>(place.room_OI, place);
}

}  // namespace corank
