#include "trainer/weights/formats.h"

namespace corank {
namespace {

/// 8 bits a weight and a scale for each output row (methods 6.10).
class Int8Weight : public FrozenWeight {
 public:
  Int8Weight(const ops::Int8& weight, at::ScalarType dtype, WeightPlace place)
      : FrozenWeight(std::move(place)), dtype_(dtype) {
    keep({weight.q_OI, weight.scale_O1});
  }

 private:
  at::Tensor unpack(Pass pass) const override {
    const auto tensors = stored(pass);
    return ops::int8_dequantise({tensors[0], tensors[1]}, dtype_);
  }

  at::ScalarType dtype_;
};

}  // namespace

std::unique_ptr<FrozenWeight> make_int8_weight(const FormatOptions& options, const StoredWeight& stored,
                                               const Shard& shard, const WeightPlace& place) {
  const bool has_full_rows = shard.dim != 1;
  ops::Int8 weight = ops::int8_quantise(read_finite(stored, has_full_rows ? shard : Shard{}));
  if (!has_full_rows) weight.q_OI = take_shard(weight.q_OI, shard).contiguous();
  weight = {weight.q_OI.to(options.device), weight.scale_O1.to(options.device)};
  return std::make_unique<Int8Weight>(weight, options.dtype, place);
}

}  // namespace corank
