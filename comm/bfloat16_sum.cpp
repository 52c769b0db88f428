#include "comm/gradient_sum.h"

// Gradients travel in bfloat16. What rounding a rank's gradient drops is added to its next one before that is rounded
// (error feedback, arXiv 1901.09847), so that over the steps nothing of it is lost. The collective rounds its sums too,
// to 2^-9 of each; that is not fed back, for no rank knows it.
namespace corank {
namespace {

class Bfloat16Sum : public GradientSum {
 public:
  Bfloat16Sum(const Mesh& mesh, const GradientBuffers& buffers)
      : GradientSum(mesh, buffers),
        dropped_(at::zeros({buffers.everywhere.numel() + buffers.data.numel()}, buffers.data.options())),
        before_(dropped_.clone()) {}

  void reduce() override {
    before_.copy_(dropped_);
    int64_t begin = 0;
    for (const Part& part : parts()) {
      const at::Tensor dropped = dropped_.narrow(0, begin, part.buffer.numel());
      begin += part.buffer.numel();
      if (part.group.size() == 1) continue;  // nothing travels
      part.buffer.add_(dropped);
      const at::Tensor wire = part.buffer.to(at::kBFloat16);
      dropped.copy_(part.buffer).sub_(wire);
      part.group.all_reduce(wire, ReduceOp::sum, buffers().purpose);
      part.buffer.copy_(wire);
    }
  }
  void end_step(bool done) override {
    if (!done) dropped_.copy_(before_);
  }
  at::Tensor carried() const override { return dropped_; }

 private:
  at::Tensor dropped_, before_;  ///< everywhere, then data
};

}  // namespace

const GradientSumEntry& bfloat16_sum() {
  static const GradientSumEntry entry{
      "bfloat16", 2 * sizeof(float),
      [](const Mesh& mesh, const GradientBuffers& buffers) -> std::unique_ptr<GradientSum> {
        return std::make_unique<Bfloat16Sum>(mesh, buffers);
      },
      [](int64_t elements) {
        return Transfer{Collective::all_reduce, elements, sizeof(at::BFloat16)};
      }};
  return entry;
}

}  // namespace corank
