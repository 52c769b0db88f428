#include <limits>

#include "comm/gradient_sum.h"

// A sum of whole numbers is the same in every order. Each micro-batch's gradient, formed from zero, is rounded to
// multiples of 2^-48 and added up in int64, on the rank and by the collective: so neither the number of ranks nor which
// of them has which micro-batch moves a bit. 2^-48 is 4e-15: elements above 3e-8 keep all bits that float32 has, and
// AdamW's epsilon hides what smaller ones lose.
namespace corank {
namespace {

constexpr double kUnitsOfGradient = 0x1p48;
constexpr double kUnitsOfLoss = 0x1p36;  // float64 adds up to 2^17 of such without rounding
constexpr double kLargestSum = 0x1p14;   // of one element; 2^62 units

class ExactSum : public GradientSum {
 public:
  ExactSum(const Mesh& mesh, const GradientBuffers& buffers)
      : GradientSum(mesh, buffers),
        too_large_(kLargestSum / static_cast<double>(buffers.micro_batches * mesh.tp().size())) {
    for (const Part& part : parts()) {
      sums_.push_back(at::zeros({part.buffer.numel() + 1}, part.buffer.options().dtype(at::kLong)));
    }
  }

  at::Tensor add_micro_batch(const at::Tensor& loss) override {
    for (size_t i = 0; i < sums_.size(); ++i) {
      const at::Tensor& gradient = parts()[i].buffer;
      const at::Tensor sound = gradient.abs().lt_(too_large_).to(at::kBool);  // NaN is not
      units(i).add_(gradient.mul_(kUnitsOfGradient).round_().masked_fill_(sound.logical_not(), 0).to(at::kLong));
      num_unsound(i).add_(sound.all().logical_not());
      gradient.zero_();
    }
    return loss.mul(kUnitsOfLoss).round_().div_(kUnitsOfLoss);
  }
  void reduce() override {
    for (size_t i = 0; i < sums_.size(); ++i) {
      const Part& part = parts()[i];
      part.group.all_reduce(sums_[i], ReduceOp::sum, buffers().purpose);
      part.buffer.copy_(units(i).to(at::kDouble).div_(kUnitsOfGradient));
      part.buffer.masked_fill_(num_unsound(i) > 0, std::numeric_limits<float>::infinity());
      sums_[i].zero_();
    }
  }

 private:
  at::Tensor units(size_t part) const { return sums_[part].narrow(0, 0, parts()[part].buffer.numel()); }
  /// Micro-batches with an element that is not finite or so large that a sum of them might not fit.
  at::Tensor num_unsound(size_t part) const { return sums_[part][-1]; }

  double too_large_;
  std::vector<at::Tensor> sums_;  ///< of each part, and the number of unsound micro-batches behind it
};

}  // namespace

const GradientSumEntry& exact_sum() {
  static const GradientSumEntry entry{
      "exact", sizeof(int64_t),
      [](const Mesh& mesh, const GradientBuffers& buffers) -> std::unique_ptr<GradientSum> {
        return std::make_unique<ExactSum>(mesh, buffers);
      },
      [](int64_t elements) {
        return Transfer{Collective::all_reduce, elements + 1, sizeof(int64_t)};
      }};
  return entry;
}

}  // namespace corank
