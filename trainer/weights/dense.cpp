#include "trainer/weights/formats.h"

namespace corank {
namespace {

/// The weight as it is, in the compute dtype.
class DenseWeight : public FrozenWeight {
 public:
  explicit DenseWeight(at::Tensor w_OI) : w_OI_(std::move(w_OI)) {}
  at::Tensor dense_OI() const override { return w_OI_; }
  void replace(const at::Tensor& w_OI) override { w_OI_ = w_OI; }
  int64_t bytes() const override { return static_cast<int64_t>(w_OI_.nbytes()); }

 private:
  at::Tensor w_OI_;
};

}  // namespace

std::unique_ptr<FrozenWeight> make_dense_weight(const FormatOptions& options, const StoredWeight& stored,
                                                const Shard& shard) {
  return std::make_unique<DenseWeight>(stored.read(shard).to(options.device, options.dtype).contiguous());
}

}  // namespace corank
