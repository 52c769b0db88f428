#include <fmt/format.h>

#include "configs/error.h"
#include "trainer/weights/formats.h"

namespace corank {
namespace {

/// QLoRA's 4 bits a weight and an absmax for each 64, in 8 bits again with double_quant (methods 6.1 to 6.9).
class Nf4Weight : public FrozenWeight {
 public:
  Nf4Weight(const ops::Nf4& weight, const FormatOptions& options, WeightPlace place)
      : FrozenWeight(std::move(place)), options_(options), form_(weight.to(options.device)) {
    keep({form_.codes, form_.absmax_RB, form_.nested_absmax, form_.nested_map});
    form_.codes = form_.absmax_RB = form_.nested_absmax = form_.nested_map = at::Tensor();
  }

 private:
  at::Tensor unpack(Pass pass) const override {
    ops::Nf4 weight = form_;
    const auto tensors = stored(pass);
    weight.codes = tensors[0];
    weight.absmax_RB = tensors[1];
    weight.nested_absmax = tensors[2];
    weight.nested_map = tensors[3];
    return ops::nf4_dequantise(weight, options_.dtype);
  }

  FormatOptions options_;
  ops::Nf4 form_;  ///< without its tensors
};

/// As the files hold it, or quantised here.
ops::Nf4 full_weight(const FormatOptions& options, const StoredWeight& stored) {
  std::optional<ops::Nf4> found = stored.read_nf4();
  if (!found) return ops::nf4_quantise(read_finite(stored, {}), options.double_quant);
  if (found->double_quantised() != options.double_quant) {
    throw ConfigError(fmt::format(
        "model.double_quant: {}, but {} is stored {} double quantisation. Write model.double_quant: {}.",
        options.double_quant, stored.name, options.double_quant ? "without" : "with", !options.double_quant));
  }
  return *std::move(found);
}

}  // namespace

std::unique_ptr<FrozenWeight> make_nf4_weight(const FormatOptions& options, const StoredWeight& stored,
                                              const Shard& shard, const WeightPlace& place) {
  ops::Nf4 weight = full_weight(options, stored);
  if (!shard.whole()) weight = ops::nf4_narrow(weight, shard.dim, shard.start, shard.block);
  return std::make_unique<Nf4Weight>(weight, options, place);
}

}  // namespace corank
