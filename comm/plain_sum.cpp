#include "comm/gradient_sum.h"

namespace corank {
namespace {

class PlainSum : public GradientSum {
 public:
  using GradientSum::GradientSum;

  void reduce() override {
    for (const Part& part : parts()) part.group.all_reduce(part.buffer, ReduceOp::sum, buffers().purpose);
  }
};

}  // namespace

const GradientSumEntry& plain_sum() {
  static const GradientSumEntry entry{
      "float32", 0,
      [](const Mesh& mesh, const GradientBuffers& buffers) -> std::unique_ptr<GradientSum> {
        return std::make_unique<PlainSum>(mesh, buffers);
      },
      [](int64_t elements) {
        return Transfer{Collective::all_reduce, elements, sizeof(float)};
      }};
  return entry;
}

}  // namespace corank
