#include <torch/csrc/autograd/autograd.h>

#include "tests/support.h"
#include "trainer/ops/attention.h"
#include "trainer/ops/random.h"

// The CUDA attention kernels in bfloat16 against the plain formula in float32, forward and backward: uniform and ragged
// segments, several head sizes, windows and groups of queries, with and without causality.
namespace corank::ops {
namespace {

using test::relative_error;

at::Tensor random(std::vector<int64_t> shape, const std::string& name) {
  at::Tensor t = at::empty(shape, at::TensorOptions(at::kFloat));
  fill_normal(t, key_of(1, "attention", name), 0, 1, shape, std::vector<int64_t>(shape.size(), 0));
  return t.to(at::kCUDA, at::kBFloat16);
}

struct Result {
  at::Tensor out, dq, dk, dv;
};

using Function = at::Tensor (*)(const at::Tensor&, const at::Tensor&, const at::Tensor&, const Segments&,
                                const AttentionRule&);

Result run(Function function, const std::vector<at::Tensor>& qkvg, at::ScalarType dtype, const Segments& segments,
           const AttentionRule& rule) {
  std::vector<at::Tensor> in;
  for (int i = 0; i < 3; ++i) in.push_back(qkvg[i].to(dtype).detach().requires_grad_());
  const at::Tensor out = function(in[0], in[1], in[2], segments, rule);
  const auto grads = torch::autograd::grad({out}, in, {qkvg[3].to(dtype)});
  return {out.detach(), grads[0], grads[1], grads[2]};
}

TEST(AttentionGpu, EveryShapeIsThePlainFormula) {
  const std::vector<std::vector<int64_t>> sets{{64},     {63},    {128, 128}, {9, 9},         {12, 12, 12}, {22, 22},
                                               {20, 21}, {5, 24}, {1, 7},     {10, 8, 9, 30}, {256, 256},   {300},
                                               {2, 2},   {1},     {1, 1, 1},  {64, 1, 64}};
  struct Size {
    int64_t width, window = 0;
    bool causal = true;
  };
  const std::vector<Size> sizes{{8}, {64}, {128}, {64, 1}, {64, 16}, {128, 100}, {64, 0, false}, {128, 0, false}};
  for (const auto& [width, window, causal] : sizes) {
    const AttentionRule rule{0.3, window, {}, 0, causal};
    for (const auto& lengths : sets) {
      SCOPED_TRACE(testing::PrintToString(lengths) + " x " + std::to_string(width) + " window " +
                   std::to_string(window) + (causal ? "" : " not causal"));
      std::vector<int64_t> ends{0};
      for (const int64_t length : lengths) ends.push_back(ends.back() + length);
      const Segments segments{at::tensor(ends, at::kLong).to(at::kCUDA, at::kInt), lengths,
                              *std::max_element(lengths.begin(), lengths.end())};
      const int64_t n = ends.back();
      const std::vector<at::Tensor> qkvg{random({n, 8, width}, "q"), random({n, 4, width}, "k"),
                                         random({n, 4, width}, "v"), random({n, 8 * width}, "g")};
      const Result fast = run(attention, qkvg, at::kBFloat16, segments, rule);
      const Result plain = run(attention_reference, qkvg, at::kFloat, segments, rule);
      EXPECT_LT(relative_error(fast.out, plain.out), 5e-3);
      EXPECT_LT(relative_error(fast.dv, plain.dv), 1e-2);
      // Where one key is all there is, the softmax is constant and these are zero up to rounding.
      const double size = at::linalg_vector_norm(plain.dv.to(at::kDouble)).item<double>();
      EXPECT_LT(at::linalg_vector_norm((fast.dq - plain.dq).to(at::kDouble)).item<double>() / size, 1e-2);
      EXPECT_LT(at::linalg_vector_norm((fast.dk - plain.dk).to(at::kDouble)).item<double>() / size, 1e-2);
    }
  }
}

}  // namespace
}  // namespace corank::ops
