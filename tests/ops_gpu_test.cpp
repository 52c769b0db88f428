// The CUDA kernels against float64 arithmetic on the CPU, and bit by bit where they promise the bits of the plain form.
// Every at::empty is filled with NaN here, so what a kernel does not write is seen.
// Legend: N tokens, D features, H heads, d features of a head, V vocabulary.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "trainer/methods/mora_update.h"
#include "trainer/ops/cuda.h"
#include "trainer/ops/dropout.h"
#include "trainer/ops/quantize.h"

namespace corank::ops {
namespace {

using ::testing::AssertionFailure;
using ::testing::AssertionResult;
using ::testing::AssertionSuccess;

const at::Device kGpu(at::kCUDA);
const std::vector<at::ScalarType> kTypes = {at::kFloat, at::kBFloat16};
const std::vector<int64_t> kRows = {1, 7, 257};
const std::vector<int64_t> kWidths = {1, 8, 100, 576, 2056, 4096, 5000, 8192, 16392};
constexpr double kEps = 1e-5;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

class GpuKernels : public ::testing::Test {
 protected:
  void SetUp() override {
    at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
    at::globalContext().setDeterministicFillUninitializedMemory(true);
    at::manual_seed(7);
  }
  void TearDown() override { at::globalContext().setDeterministicAlgorithms(false, /*warn_only=*/false); }
};

// ---- Comparisons

/// Largest relative L2 distance to float64.
double bound(at::ScalarType type) { return type == at::kBFloat16 ? 4e-3 : 1e-6; }

/// Two measures: the L2 distance of all, and the largest of one element relative to its size plus the root mean square
/// (one wrong element of many does not show in the first).
AssertionResult close(const at::Tensor& got, const at::Tensor& expected) {
  if (got.sizes() != expected.sizes()) {
    return AssertionFailure() << "got " << got.sizes() << ", expected " << expected.sizes();
  }
  const at::Tensor difference = got.cpu().to(at::kDouble) - expected;
  if (!difference.isfinite().all().item<bool>()) return AssertionFailure() << "not finite";
  const double rms = expected.square().mean().sqrt().item<double>();
  const double relative = difference.square().mean().sqrt().item<double>() / rms;
  const double largest = (difference.abs() / (expected.abs() + rms)).max().item<double>();
  const double limit = bound(got.scalar_type());
  if (relative <= limit && largest <= 4 * limit) return AssertionSuccess();
  return AssertionFailure() << got.scalar_type() << " " << got.sizes() << ": relative L2 " << relative
                            << ", worst element " << largest << ", allowed " << limit << " and " << 4 * limit;
}

/// By value, so that NaN differs from all.
AssertionResult same_values(const at::Tensor& got, const at::Tensor& expected) {
  const at::Tensor host = got.cpu();
  if (host.scalar_type() == expected.scalar_type() && at::equal(host, expected.cpu())) return AssertionSuccess();
  return AssertionFailure() << "got " << host.scalar_type() << " " << host.sizes() << ", expected "
                            << expected.scalar_type() << " " << expected.sizes() << ", or other values";
}

// ---- Inputs

at::Tensor normal(at::IntArrayRef shape, at::ScalarType type, double std = 1) {
  return (at::randn(shape, at::TensorOptions(at::kDouble)) * std).to(type);
}
at::Tensor integers(int64_t low, int64_t high, int64_t count) {
  return at::randint(low, high, {count}, at::TensorOptions(at::kLong));
}
at::Tensor gpu(const at::Tensor& x) { return x.to(kGpu); }
at::Tensor wide(const at::Tensor& x) { return x.to(at::kDouble); }

/// The same on the GPU, one element past a 16-byte boundary: the kernels' plain paths.
at::Tensor gpu_misaligned(const at::Tensor& x) {
  const at::Tensor storage = at::empty({x.numel() + 1}, x.options().device(kGpu));
  return storage.narrow(0, 1, x.numel()).view(x.sizes()).copy_(x);
}

template <class Check>
void for_types_and_shapes(const std::vector<int64_t>& widths, const Check& check) {
  for (const at::ScalarType type : kTypes) {
    for (const int64_t rows : kRows) {
      for (const int64_t width : widths) {
        SCOPED_TRACE(std::string(c10::toString(type)) + " " + std::to_string(rows) + " x " + std::to_string(width));
        check(type, rows, width);
      }
    }
  }
}

TEST_F(GpuKernels, EmptyMemoryIsPoisoned) {
  for (const at::ScalarType type : kTypes) {
    EXPECT_TRUE(at::empty({3, 5}, at::TensorOptions(type).device(kGpu)).isnan().all().item<bool>());
  }
}

TEST_F(GpuKernels, ComparisonFindsOneWrongElement) {
  for (const at::ScalarType type : kTypes) {
    const at::Tensor x = normal({257, 5000}, type), wrong = x.clone();
    EXPECT_TRUE(close(x, wide(x)));
    wrong[200][4000].fill_(wide(x[200][4000]).item<double>() + 0.5);
    EXPECT_FALSE(close(wrong, wide(x)));
    wrong[200][4000].fill_(std::numeric_limits<double>::quiet_NaN());
    EXPECT_FALSE(close(wrong, wide(x)));
  }
}

// ---- Dropout

struct DropoutCase {
  at::Tensor x_NI;
  Dropout dropout;
};

DropoutCase dropout_case(at::ScalarType type, int64_t rows, int64_t width, double p, int64_t offset) {
  return {normal({rows, width}, type),
          Dropout{p, dropout_key(0x9E3779B97F4A7C15ull), integers(0, int64_t{1} << 40, rows), offset}};
}

at::Tensor run_dropout(const at::Tensor& x_NI, Dropout d) {
  const at::Tensor y_NI = at::empty_like(x_NI);
  d.slots_N = d.slots_N.to(kGpu);
  d.key = d.key.to(kGpu);
  cuda::dropout(x_NI, y_NI, d);
  return y_NI;
}

TEST_F(GpuKernels, DropoutHasTheBitsOfTheCpu) {
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kDouble}) {
    for (const int64_t rows : kRows) {
      for (const int64_t width : {1, 3, 100, 576, 4096, 5000}) {
        for (const int64_t offset : {0, 4, 2304, 6, 5001}) {
          const auto [x, d] = dropout_case(type, rows, width, offset == 4 ? 0.5 : 0.1, offset);
          const at::Tensor expected = dropout(x, d), got = run_dropout(gpu(x), d);
          EXPECT_TRUE(same_values(got, expected)) << type << " " << rows << " x " << width << " at " << offset;
          EXPECT_TRUE(same_values(run_dropout(gpu(x), d), got));
          EXPECT_TRUE(same_values(run_dropout(gpu_misaligned(x), d), got));
        }
      }
    }
  }
}

TEST_F(GpuKernels, DropoutDropsTheShareAskedFor) {
  const auto [x, d] = dropout_case(at::kFloat, 257, 4096, 0.1, 0);
  const double share = run_dropout(gpu(x), d).eq(0).to(at::kDouble).mean().item<double>();
  EXPECT_NEAR(share, 0.1, 0.002);
}

TEST_F(GpuKernels, DropoutPlantedKeyIsFound) {
  const auto [x, d] = dropout_case(at::kBFloat16, 7, 576, 0.1, 0);
  Dropout other = d;
  other.key = other.key + 1;
  EXPECT_TRUE(same_values(run_dropout(gpu(x), d), dropout(x, d)));
  EXPECT_FALSE(same_values(run_dropout(gpu(x), d), dropout(x, other)));
}

// ---- RMSNorm

/// In float64: (y, rstd).
std::pair<at::Tensor, at::Tensor> norm_reference(const at::Tensor& h, const at::Tensor& weight, double eps) {
  const at::Tensor rstd = wide(h).square().mean(-1, /*keepdim=*/true).add(eps).rsqrt();
  return {wide(h) * rstd * wide(weight), rstd};
}

/// `mean_share` 1: the gradient; anything else: a planted error.
at::Tensor norm_backward_reference(const at::Tensor& grad, const at::Tensor& h, const at::Tensor& rstd,
                                   const at::Tensor& weight, double mean_share = 1) {
  const at::Tensor normed = wide(h) * wide(rstd), gw = wide(grad) * wide(weight);
  return (gw - normed * (gw * normed).mean(-1, /*keepdim=*/true) * mean_share) * wide(rstd);
}

TEST_F(GpuKernels, RmsNormForward) {
  for_types_and_shapes(kWidths, [](at::ScalarType type, int64_t rows, int64_t width) {
    const at::Tensor h = normal({rows, width}, type, 0.1), weight = normal({width}, type);
    const auto [y, rstd] = cuda::rms_norm_forward(gpu(h), gpu(weight), kEps);
    const auto [expected_y, expected_rstd] = norm_reference(h, weight, kEps);
    EXPECT_TRUE(close(y, expected_y));
    EXPECT_TRUE(close(rstd, expected_rstd));
    EXPECT_EQ(y.scalar_type(), type);
    EXPECT_EQ(rstd.scalar_type(), at::kFloat);
    EXPECT_TRUE(same_values(y, (h.to(at::kFloat) * rstd.cpu()).to(type).mul_(weight))) << "rounding of the plain form";
    const auto [y_again, rstd_again] = cuda::rms_norm_forward(gpu(h), gpu(weight), kEps);
    EXPECT_TRUE(same_values(y_again, y) && same_values(rstd_again, rstd)) << "second run";
    const auto [y_plain, rstd_plain] = cuda::rms_norm_forward(gpu_misaligned(h), gpu_misaligned(weight), kEps);
    EXPECT_TRUE(close(y_plain, expected_y));
    EXPECT_TRUE(close(rstd_plain, expected_rstd));
  });
}

TEST_F(GpuKernels, RmsNormBackward) {
  for_types_and_shapes(kWidths, [](at::ScalarType type, int64_t rows, int64_t width) {
    if (width == 1) return;  // the gradient is all but zero: a difference of equal terms
    const at::Tensor h = normal({rows, width}, type), weight = normal({width}, type),
                     grad = normal({rows, width}, type);
    const at::Tensor rstd = norm_reference(h, weight, kEps).second.to(at::kFloat);
    const auto run = [&] { return cuda::rms_norm_backward(gpu(grad), gpu(h), gpu(rstd), gpu(weight)); };
    const at::Tensor dh = run(), expected = norm_backward_reference(grad, h, rstd, weight);
    EXPECT_TRUE(close(dh, expected));
    EXPECT_EQ(dh.scalar_type(), type);
    EXPECT_TRUE(same_values(run(), dh)) << "second run";
    EXPECT_TRUE(close(cuda::rms_norm_backward(gpu(grad), gpu_misaligned(h), gpu(rstd), gpu(weight)), expected));
  });
}

TEST_F(GpuKernels, RmsNormPlantedErrorsAreFound) {
  for (const at::ScalarType type : kTypes) {
    const at::Tensor h = normal({7, 576}, type, 0.01), weight = normal({576}, type), grad = normal({7, 576}, type);
    const auto [y, rstd] = cuda::rms_norm_forward(gpu(h), gpu(weight), kEps);
    EXPECT_TRUE(close(y, norm_reference(h, weight, kEps).first));
    EXPECT_FALSE(close(y, norm_reference(h, weight, 1.2 * kEps).first));
    EXPECT_FALSE(close(rstd, norm_reference(h, weight, 1.0001 * kEps).second));
    const at::Tensor dh = cuda::rms_norm_backward(gpu(grad), gpu(h), rstd, gpu(weight));
    EXPECT_TRUE(close(dh, norm_backward_reference(grad, h, rstd.cpu(), weight)));
    EXPECT_FALSE(close(dh, norm_backward_reference(grad, h, rstd.cpu(), weight, 0)));
  }
}

// ---- RoPE

struct RopeCase {
  at::Tensor x_NHd, cos_Td, sin_Td, positions_N;
};

RopeCase rope_case(at::ScalarType type, int64_t rows, int64_t heads, int64_t width) {
  const at::Tensor angles = at::rand({300, width / 2}, at::TensorOptions(at::kDouble)) * 6.3;
  return {normal({rows, heads, width}, type), angles.cos().to(at::kFloat), angles.sin().to(at::kFloat),
          integers(0, 300, rows)};
}

/// The plain form, with arithmetic in `dtype`.
at::Tensor rope_reference(const RopeCase& c, int direction, at::ScalarType dtype) {
  const at::Tensor cos = c.cos_Td.index_select(0, c.positions_N).unsqueeze(1).to(dtype);
  const at::Tensor sin = c.sin_Td.index_select(0, c.positions_N).unsqueeze(1).to(dtype) * direction;
  const std::vector<at::Tensor> halves = c.x_NHd.to(dtype).chunk(2, 2);
  return at::cat({halves[0] * cos - halves[1] * sin, halves[1] * cos + halves[0] * sin}, 2);
}

at::Tensor run_rope(const RopeCase& c, const at::Tensor& x_NHd, int direction) {
  return cuda::rope(x_NHd, gpu(c.cos_Td), gpu(c.sin_Td), gpu(c.positions_N), direction);
}

TEST_F(GpuKernels, RopeHasTheBitsOfThePlainForm) {
  const std::vector<std::pair<int64_t, int64_t>> heads_and_widths = {{9, 64}, {32, 128}, {8, 128},  {3, 100}, {5, 40},
                                                                     {1, 2},  {300, 8},  {2, 1040}, {2, 4608}};
  for (const at::ScalarType type : kTypes) {
    for (const int64_t rows : kRows) {
      for (const auto& [heads, width] : heads_and_widths) {
        SCOPED_TRACE(std::to_string(rows) + " x " + std::to_string(heads) + " x " + std::to_string(width));
        const RopeCase c = rope_case(type, rows, heads, width);
        for (const int direction : {1, -1}) {
          const at::Tensor y = run_rope(c, gpu(c.x_NHd), direction);
          EXPECT_TRUE(same_values(y, rope_reference(c, direction, at::kFloat).to(type))) << type;
          EXPECT_TRUE(close(y, rope_reference(c, direction, at::kDouble)));
          EXPECT_TRUE(same_values(run_rope(c, gpu(c.x_NHd), direction), y)) << "second run";
          EXPECT_TRUE(same_values(run_rope(c, gpu_misaligned(c.x_NHd), direction), y)) << "misaligned";
        }
      }
    }
  }
}

TEST_F(GpuKernels, RopePlantedDirectionIsFound) {
  for (const at::ScalarType type : kTypes) {
    const RopeCase c = rope_case(type, 7, 9, 64);
    EXPECT_FALSE(close(run_rope(c, gpu(c.x_NHd), 1), rope_reference(c, -1, at::kDouble)));
  }
}

// ---- SwiGLU

at::Tensor swiglu_reference(const at::Tensor& gate, const at::Tensor& up) {
  return wide(gate) * at::sigmoid(wide(gate)) * wide(up);
}

/// (dgate, dup).
std::pair<at::Tensor, at::Tensor> swiglu_backward_reference(const at::Tensor& grad, const at::Tensor& gate,
                                                            const at::Tensor& up) {
  const at::Tensor g = wide(grad), x = wide(gate), s = at::sigmoid(x);
  return {g * wide(up) * s * (1 + x * (1 - s)), g * x * s};
}

TEST_F(GpuKernels, SwiGlu) {
  for_types_and_shapes({1, 100, 576, 4096, 5000}, [](at::ScalarType type, int64_t rows, int64_t width) {
    const at::Tensor gate = normal({rows, width}, type, 3), up = normal({rows, width}, type);
    const at::Tensor grad = normal({rows, width}, type);
    const at::Tensor y = cuda::swiglu_forward(gpu(gate), gpu(up));
    EXPECT_TRUE(close(y, swiglu_reference(gate, up)));
    EXPECT_TRUE(same_values(cuda::swiglu_forward(gpu(gate), gpu(up)), y)) << "second run";
    EXPECT_TRUE(same_values(cuda::swiglu_forward(gpu(gate), gpu_misaligned(up)), y)) << "misaligned";
    const auto [dgate, dup] = cuda::swiglu_backward(gpu(grad), gpu(gate), gpu(up));
    const auto [expected_dgate, expected_dup] = swiglu_backward_reference(grad, gate, up);
    EXPECT_TRUE(close(dgate, expected_dgate));
    EXPECT_TRUE(close(dup, expected_dup));
    const auto [dgate_plain, dup_plain] = cuda::swiglu_backward(gpu_misaligned(grad), gpu(gate), gpu(up));
    EXPECT_TRUE(same_values(dgate_plain, dgate) && same_values(dup_plain, dup)) << "misaligned";
  });
}

TEST_F(GpuKernels, SwiGluTakesLargeGates) {
  for (const at::ScalarType type : kTypes) {
    const at::Tensor gate = at::tensor({-1e4, -200., -100., -88., -30., 0., 30., 88., 200., 1e4}).to(type);
    const at::Tensor one = at::ones_like(gate);
    EXPECT_TRUE(close(cuda::swiglu_forward(gpu(gate), gpu(one)), swiglu_reference(gate, one)));
    const auto [dgate, dup] = cuda::swiglu_backward(gpu(one), gpu(gate), gpu(one));
    EXPECT_TRUE(close(dgate, swiglu_backward_reference(one, gate, one).first));
    EXPECT_TRUE(close(dup, swiglu_backward_reference(one, gate, one).second));
  }
}

TEST_F(GpuKernels, SwiGluPlantedSwapIsFound) {
  for (const at::ScalarType type : kTypes) {
    const at::Tensor gate = normal({7, 576}, type), up = normal({7, 576}, type), grad = normal({7, 576}, type);
    EXPECT_FALSE(close(cuda::swiglu_forward(gpu(gate), gpu(up)), swiglu_reference(up, gate)));
    const auto [dgate, dup] = cuda::swiglu_backward(gpu(grad), gpu(gate), gpu(up));
    EXPECT_FALSE(close(dgate, swiglu_backward_reference(grad, up, gate).first));
    EXPECT_FALSE(close(dup, swiglu_backward_reference(grad, up, gate).second));
  }
}

// ---- Cross-entropy

const std::vector<std::pair<int64_t, int64_t>> kLogits = {
    {1, 130}, {7, 130}, {257, 130}, {1, 49152}, {7, 49152}, {33, 49152}, {257, 4099}, {1, 128256}, {7, 128256}, {5, 1}};

template <class Check>
void for_logits(const Check& check) {
  for (const at::ScalarType type : kTypes) {
    for (const auto& [rows, width] : kLogits) {
      SCOPED_TRACE(std::string(c10::toString(type)) + " " + std::to_string(rows) + " x " + std::to_string(width));
      check(normal({rows, width}, type, 2));
    }
  }
}

/// Of each kind: in the vocabulary, at its ends, before it, beyond it.
at::Tensor some_targets(int64_t rows, int64_t width) {
  const at::Tensor targets = integers(0, width, rows);
  const std::vector<int64_t> special = {width - 1, -1, width, 0, width + 7};
  for (int64_t row = 1; row < std::min<int64_t>(rows, 6); ++row) targets[row].fill_(special[row - 1]);
  return targets;
}

at::Tensor outside(int64_t rows) { return at::full({rows}, -1, at::TensorOptions(at::kLong)); }

/// (max, sum, target's logit) in float64.
std::vector<at::Tensor> statistics_reference(const at::Tensor& logits, const at::Tensor& targets) {
  const int64_t width = logits.size(1);
  const at::Tensor x = wide(logits), max = x.amax(1);
  const at::Tensor picked = x.gather(1, targets.clamp(0, width - 1).unsqueeze(1)).squeeze(1);
  const at::Tensor here = targets.ge(0).logical_and(targets.lt(width));
  return {max, (x - max.unsqueeze(1)).exp().sum(1), at::where(here, picked, at::zeros_like(picked))};
}

at::Tensor softmax_gradient_reference(const at::Tensor& logits, const at::Tensor& lse, const at::Tensor& targets) {
  at::Tensor expected = (wide(logits) - wide(lse).unsqueeze(1)).exp();
  for (int64_t row = 0; row < logits.size(0); ++row) {
    const auto target = targets[row].item<int64_t>();
    if (target >= 0 && target < logits.size(1)) expected[row][target] -= 1;
  }
  return expected;
}

at::Tensor log_sum_exp(const at::Tensor& logits) { return wide(logits).logsumexp(1).to(at::kFloat); }

void expect_statistics(const at::Tensor& on_gpu, const at::Tensor& logits, const at::Tensor& targets) {
  const auto [max, sum, target] = cuda::softmax_statistics(on_gpu, gpu(targets));
  const std::vector<at::Tensor> expected = statistics_reference(logits, targets);
  EXPECT_TRUE(same_values(max, expected[0].to(at::kFloat)));
  EXPECT_TRUE(close(sum, expected[1]));
  EXPECT_TRUE(same_values(target, expected[2].to(at::kFloat)));
  const auto [max_again, sum_again, target_again] = cuda::softmax_statistics(on_gpu, gpu(targets));
  EXPECT_TRUE(same_values(max_again, max) && same_values(sum_again, sum) && same_values(target_again, target))
      << "second run";
}

TEST_F(GpuKernels, SoftmaxStatistics) {
  for_logits([](const at::Tensor& logits) {
    const at::Tensor targets = some_targets(logits.size(0), logits.size(1));
    expect_statistics(gpu(logits), logits, targets);
    expect_statistics(gpu_misaligned(logits), logits, targets);
  });
}

TEST_F(GpuKernels, SoftmaxStatisticsTakeExtremes) {
  for (const at::ScalarType type : kTypes) {
    for (const int64_t width : {130, 49152}) {
      const at::Tensor logits = normal({4, width}, type, 2);
      logits[0].narrow(0, 0, width - 1).fill_(-kInfinity);  // all but one are -inf
      logits[1].narrow(0, 0, width / 2).fill_(-kInfinity);
      logits[2].copy_(at::arange(width, at::kDouble) * (1000. / width));  // the maximum grows all the way
      logits[3].fill_(-30000);
      for (const at::Tensor& row : logits.split(1)) expect_statistics(gpu(row), row, outside(1));
    }
  }
}

TEST_F(GpuKernels, SoftmaxStatisticsPassNaNOn) {
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), kInfinity}) {
    const at::Tensor logits = normal({3, 49152}, at::kFloat);
    logits[1][777].fill_(bad);
    const at::Tensor sum = std::get<1>(cuda::softmax_statistics(gpu(logits), gpu(outside(3))));
    EXPECT_TRUE(same_values(sum.isnan(), at::tensor({0, 1, 0}).to(at::kBool)));
  }
}

TEST_F(GpuKernels, SoftmaxOfAnEmptyVocabulary) {
  const at::Tensor logits = gpu(normal({3, 0}, at::kFloat)), targets = gpu(outside(3));
  const auto [max, sum, target] = cuda::softmax_statistics(logits, targets);
  EXPECT_TRUE(same_values(max, at::full({3}, -kInfinity, at::kFloat)));
  EXPECT_TRUE(same_values(sum, at::zeros({3}, at::kFloat)) && same_values(target, at::zeros({3}, at::kFloat)));
  cuda::softmax_gradient(logits, max, targets);
}

/// The logits `on_gpu` after the kernel.
at::Tensor run_softmax_gradient(const at::Tensor& on_gpu, const at::Tensor& lse, const at::Tensor& targets) {
  cuda::softmax_gradient(on_gpu, gpu(lse), gpu(targets));
  return on_gpu;
}

TEST_F(GpuKernels, SoftmaxGradient) {
  for_logits([](const at::Tensor& logits) {
    if (logits.size(1) == 1) return;  // the gradient is zero
    const at::Tensor lse = log_sum_exp(logits);
    // Without targets the small probabilities are seen, beside a -1 they are not.
    for (const at::Tensor& targets : {some_targets(logits.size(0), logits.size(1)), outside(logits.size(0))}) {
      const at::Tensor gradient = run_softmax_gradient(gpu(logits), lse, targets);
      EXPECT_TRUE(close(gradient, softmax_gradient_reference(logits, lse, targets)));
      EXPECT_TRUE(same_values(run_softmax_gradient(gpu(logits), lse, targets), gradient)) << "second run";
      EXPECT_TRUE(same_values(run_softmax_gradient(gpu_misaligned(logits), lse, targets), gradient)) << "misaligned";
    }
  });
}

TEST_F(GpuKernels, SoftmaxPlantedErrorsAreFound) {
  for (const at::ScalarType type : kTypes) {
    const at::Tensor logits = normal({7, 130}, type, 2), lse = log_sum_exp(logits);
    const at::Tensor targets = integers(0, 129, 7);
    const auto [max, sum, target] = cuda::softmax_statistics(gpu(logits), gpu(targets));
    EXPECT_FALSE(close(sum, statistics_reference(logits.narrow(1, 0, 129), targets)[1]));
    EXPECT_FALSE(same_values(target, statistics_reference(logits, targets + 1)[2].to(at::kFloat)));
    const at::Tensor gradient = run_softmax_gradient(gpu(logits), lse, targets);
    EXPECT_TRUE(close(gradient, softmax_gradient_reference(logits, lse, targets)));
    EXPECT_FALSE(close(gradient, softmax_gradient_reference(logits, lse, targets + 1)));
    EXPECT_FALSE(close(gradient, softmax_gradient_reference(logits, lse * 1.01, targets)));
  }
}

// ---- Quantised weights

/// Wide and plain packs: runs at multiples of 8 and not, within one block and over its edges, odd sizes.
template <class Check>
void for_nf4(const Check& check) {
  for (const std::vector<int64_t>& shape : std::vector<std::vector<int64_t>>{{512, 1376}, {64, 172}, {7, 33}, {1, 1}}) {
    for (const bool double_quant : {false, true}) {
      const Nf4 full = nf4_quantise(normal(shape, at::kFloat, 0.02), double_quant);
      check(full);
      for (const int64_t dim : {0, 1}) {
        for (const int64_t ranks : {2, 3, 8}) {
          if (const int64_t length = shape[dim] / ranks; length > 0) check(nf4_narrow(full, dim, length, length));
        }
      }
    }
  }
}

TEST_F(GpuKernels, Nf4HasTheBitsOfTheCpu) {
  for_nf4([](const Nf4& w) {
    SCOPED_TRACE(testing::Message() << w.shape[0] << " x " << w.shape[1] << " from " << w.runs.start);
    Nf4 on_gpu = w.to(kGpu);
    for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kDouble}) {
      const at::Tensor expected = nf4_dequantise(w, type);
      on_gpu.codes = gpu(w.codes);
      EXPECT_TRUE(same_values(nf4_dequantise(on_gpu, type), expected)) << type;
      on_gpu.codes = gpu_misaligned(w.codes);
      EXPECT_TRUE(same_values(nf4_dequantise(on_gpu, type), expected)) << type << " misaligned";
    }
  });
}

TEST_F(GpuKernels, Int8HasTheBitsOfTheCpu) {
  for (const int64_t width : {1, 100, 4096}) {
    const Int8 w = int8_quantise(normal({257, width}, at::kFloat, 0.02)), on_gpu{gpu(w.q_OI), gpu(w.scale_O1)};
    for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kDouble}) {
      EXPECT_TRUE(same_values(int8_dequantise(on_gpu, type), int8_dequantise(w, type))) << type << " " << width;
    }
  }
}

TEST_F(GpuKernels, Nf4PlantedErrorsAreFound) {
  const Nf4 w = nf4_quantise(normal({64, 256}, at::kFloat, 0.02), true), on_gpu = w.to(kGpu);
  const auto dequantised = [](const Nf4& x) { return nf4_dequantise(x, at::kFloat); };
  ASSERT_TRUE(same_values(dequantised(on_gpu), dequantised(w)));
  Nf4 offset = w, moved = w, swapped = w;
  offset.nested_offset = std::nextafter(w.nested_offset, 1.0F);
  moved.runs.start = 8;
  swapped.codes = w.codes.bitwise_right_shift(4).bitwise_or(w.codes.bitwise_left_shift(4));
  for (const Nf4& wrong : {offset, moved, swapped}) EXPECT_FALSE(same_values(dequantised(on_gpu), dequantised(wrong)));
}

// ---- DoRA

struct ScaledSumCase {
  at::Tensor q_NO, u_NR, b_OR, gamma_O;
  double scale = 0.7;
};

ScaledSumCase scaled_sum_case(int64_t rows, int64_t width, int64_t rank) {
  return {normal({rows, width}, at::kBFloat16), normal({rows, rank}, at::kBFloat16),
          normal({width, rank}, at::kBFloat16), normal({width}, at::kFloat)};
}

at::Tensor run_scaled_sum(const ScaledSumCase& c) {
  const at::Tensor q_NO = gpu(c.q_NO);
  cuda::scaled_low_rank_sum(q_NO, gpu(c.u_NR), gpu(c.b_OR), c.scale, gpu(c.gamma_O));
  return q_NO;
}

at::Tensor scaled_sum_reference(const ScaledSumCase& c) {
  return wide(c.gamma_O) * (wide(c.q_NO) + c.scale * at::mm(wide(c.u_NR), wide(c.b_OR).t()));
}

TEST_F(GpuKernels, ScaledLowRankSum) {
  for (const int64_t rows : {1, 7, 64, 257}) {
    for (const int64_t width : {1, 100, 576, 4096}) {
      for (const int64_t rank : {8, 16, 24, 128}) {
        const ScaledSumCase c = scaled_sum_case(rows, width, rank);
        EXPECT_TRUE(close(run_scaled_sum(c), scaled_sum_reference(c))) << rows << " x " << width << ", rank " << rank;
      }
    }
  }
}

TEST_F(GpuKernels, ScaledLowRankSumPlantedErrorsAreFound) {
  const ScaledSumCase c = scaled_sum_case(257, 576, 24);
  const at::Tensor got = run_scaled_sum(c);
  ScaledSumCase short_rank = c, shifted = c, one_row = c;
  short_rank.b_OR = c.b_OR.clone();
  short_rank.b_OR.narrow(1, 23, 1).zero_();
  shifted.gamma_O = c.gamma_O.roll(1);
  one_row.u_NR = c.u_NR.clone();
  one_row.u_NR[256].zero_();
  for (const ScaledSumCase& wrong : {short_rank, shifted, one_row}) {
    EXPECT_FALSE(close(got, scaled_sum_reference(wrong)));
  }
}

TEST_F(GpuKernels, SquaredRowNorms) {
  for (const auto& [out, in] : {std::pair{1, 8}, {100, 576}, {257, 1048}, {64, 4096}}) {
    for (const int64_t rank : {8, 16, 24, 128}) {
      const at::Tensor w = normal({out, in}, at::kBFloat16), w2 = normal({out, in}, at::kBFloat16);
      const at::Tensor a = normal({rank, in}, at::kBFloat16), b = normal({out, rank}, at::kBFloat16);
      const at::Tensor expected = (wide(w) + 0.3 * at::mm(wide(b), wide(a))).square().sum(1);
      const at::Tensor got = cuda::squared_row_norms({gpu(w2), gpu(w)}, {gpu(a), gpu(a)}, {gpu(b), gpu(b)}, 0.3)[1];
      EXPECT_TRUE(close(got, expected)) << out << " x " << in << ", rank " << rank;
      EXPECT_FALSE(close(got, (wide(w) + 0.31 * at::mm(wide(b), wide(a))).square().sum(1)));
    }
  }
}

struct DoraGradientsCase {
  at::Tensor g_NO, z_NO, u_NR, gamma_O, factor_O;
};

DoraGradientsCase dora_gradients_case(int64_t rows, int64_t width, int64_t rank) {
  return {normal({rows, width}, at::kBFloat16), normal({rows, width}, at::kBFloat16),
          normal({rows, rank}, at::kBFloat16), normal({width}, at::kFloat), normal({width}, at::kFloat)};
}

bool agrees(const std::tuple<at::Tensor, at::Tensor, at::Tensor>& got, const DoraGradientsCase& c) {
  const auto& [h_NO, dm_O, hu_OR] = got;
  const at::Tensor dots_O = (wide(c.g_NO) * wide(c.z_NO)).sum(0) * wide(c.factor_O);
  return close(h_NO, wide(c.g_NO) * wide(c.gamma_O)) && close(dm_O, dots_O) &&
         close(hu_OR, at::mm(wide(h_NO.cpu()).t(), wide(c.u_NR)));
}

TEST_F(GpuKernels, DoraGradients) {
  for (const int64_t rows : {1, 7, 256, 601}) {
    for (const int64_t width : {1, 100, 576, 4096}) {
      for (const int64_t rank : {8, 16, 24, 128}) {
        const DoraGradientsCase c = dora_gradients_case(rows, width, rank);
        const auto run = [&](const at::Tensor& g_NO) {
          return cuda::dora_gradients(g_NO, gpu(c.z_NO), gpu(c.u_NR), gpu(c.gamma_O), gpu(c.factor_O));
        };
        const auto got = run(gpu(c.g_NO)), again = run(gpu(c.g_NO));
        EXPECT_TRUE(agrees(got, c)) << rows << " x " << width << ", rank " << rank;
        EXPECT_TRUE(agrees(run(gpu_misaligned(c.g_NO)), c)) << rows << " x " << width << ", rank " << rank;
        EXPECT_TRUE(same_values(std::get<1>(got), std::get<1>(again)));
        EXPECT_TRUE(same_values(std::get<2>(got), std::get<2>(again)));
      }
    }
  }
}

TEST_F(GpuKernels, DoraGradientsPlantedErrorsAreFound) {
  const DoraGradientsCase c = dora_gradients_case(257, 576, 24);
  const auto got = cuda::dora_gradients(gpu(c.g_NO), gpu(c.z_NO), gpu(c.u_NR), gpu(c.gamma_O), gpu(c.factor_O));
  DoraGradientsCase shifted = c, short_sum = c, short_product = c, short_rank = c;
  shifted.gamma_O = c.gamma_O.roll(1);
  short_sum.z_NO = c.z_NO.clone();
  short_sum.z_NO[256].zero_();
  short_product.u_NR = c.u_NR.clone();
  short_product.u_NR[256].zero_();
  short_rank.u_NR = c.u_NR.clone();
  short_rank.u_NR.narrow(1, 23, 1).zero_();
  EXPECT_TRUE(agrees(got, c));
  for (const DoraGradientsCase& wrong : {shifted, short_sum, short_product, short_rank}) {
    EXPECT_FALSE(agrees(got, wrong));
  }
}

// ---- MoRA

/// One update on its own, forward and backward.
std::vector<at::Tensor> run_mora(Mora s, const at::Tensor& m, const at::Tensor& x, const at::Tensor& g) {
  const DenseMatrix w(at::zeros({s.out.length, s.in.length}, x.options()));
  s.m_RR = {m, m};
  s.rotation.cos_BH = s.rotation.cos_BH.to(x.options());
  s.rotation.sin_BH = s.rotation.sin_BH.to(x.options());
  if (s.dropout.active()) {
    s.dropout.slots_N = s.dropout.slots_N.to(x.device());
    s.dropout.key = s.dropout.key.to(x.device());
  }
  const MoraUpdate update(s);
  std::vector<at::Tensor> saved;
  const at::Tensor y = update.forward(x, w, {}, saved);
  const at::Tensor dx = at::empty_like(x);
  m.mutable_grad() = at::Tensor();
  update.backward(g, x, w, saved, {dx, Write::over});
  return {y, m.grad(), dx};
}

Mora mora_case(Grouping compress, Grouping decompress, int64_t r, Extent in, Extent out, at::ScalarType type) {
  return {{}, compress, decompress, in, out, {}, rotation_of(r, in.size, out.size, at::TensorOptions(type))};
}

constexpr std::pair<Grouping, Grouping> kMoraTypes[] = {{Grouping::modulo, Grouping::modulo},
                                                        {Grouping::block, Grouping::block},
                                                        {Grouping::block, Grouping::modulo},
                                                        {Grouping::modulo, Grouping::block},
                                                        {Grouping::rotate, Grouping::rotate}};

/// Three roundings to bfloat16 lie between x and y, between x, g and dx; float32 sums run over more than one kernel.
bool near(const at::Tensor& got, const at::Tensor& expected) {
  const at::Tensor error = got.cpu().to(at::kDouble) - expected;
  const double limit = got.scalar_type() == at::kBFloat16 ? 1e-2 : 2e-6;
  return error.norm().item<double>() <= limit * expected.norm().item<double>();  // zeros: this rank has no part in it
}

void expect_mora_is_the_cpus(const Mora& s, int64_t r, at::ScalarType type) {
  const at::Tensor m = normal({r, r}, type), x = normal({37, s.in.length}, type), g = normal({37, s.out.length}, type);
  const auto got = run_mora(s, gpu(m), gpu(x), gpu(g)), expected = run_mora(s, wide(m), wide(x), wide(g));
  for (size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(near(got[i], expected[i])) << "result " << i;
}

TEST_F(GpuKernels, MoraOfEveryTypeShapeAndShard) {
  for (const auto& [compress, decompress] : kMoraTypes) {
    for (const auto& [in, out, r] : {std::tuple{64, 64, 16}, {576, 192, 110}, {576, 1536, 130}, {1000, 96, 94}}) {
      for (const at::ScalarType type : kTypes) {
        SCOPED_TRACE(std::string(c10::toString(type)) + " " + std::to_string(in) + " -> " + std::to_string(out) +
                     " type " + std::to_string(static_cast<int>(compress)) +
                     std::to_string(static_cast<int>(decompress)));
        const auto check = [&](Extent i, Extent o) {
          expect_mora_is_the_cpus(mora_case(compress, decompress, r, i, o, type), r, type);
        };
        check({in, 0, in}, {out, 0, out});
        check({in, in / 2, in / 2}, {out, 0, out});
        check({in, 0, in / 4}, {out, 0, out});
        check({in, 0, in}, {out, out / 4, out / 4});
      }
    }
  }
}

TEST_F(GpuKernels, MoraWithDropout) {
  Mora s = mora_case(Grouping::modulo, Grouping::modulo, 110, {576, 0, 576}, {192, 0, 192}, at::kFloat);
  s.dropout = {0.3, dropout_key(5), at::arange(37, at::kLong), 0};
  expect_mora_is_the_cpus(s, 110, at::kFloat);
}

TEST_F(GpuKernels, MoraPlantedErrorsAreFound) {
  const int64_t r = 110;
  const at::Tensor m = normal({r, r}, at::kFloat), x = normal({37, 576}, at::kFloat), g = normal({37, 192}, at::kFloat);
  const auto with = [&](Grouping compress, Grouping decompress) {
    return mora_case(compress, decompress, r, {576, 0, 576}, {192, 0, 192}, at::kFloat);
  };
  const Mora turned = with(Grouping::rotate, Grouping::rotate), shared = with(Grouping::modulo, Grouping::modulo);
  Mora back = turned, unwrapped = shared;
  back.rotation.sin_BH = turned.rotation.sin_BH.neg();
  unwrapped.in = {550, 0, 550};  // a multiple of the side: nothing stands twice
  EXPECT_FALSE(near(run_mora(turned, gpu(m), gpu(x), gpu(g))[0], run_mora(back, wide(m), wide(x), wide(g))[0]));
  EXPECT_FALSE(near(run_mora(shared, gpu(m), gpu(x), gpu(g))[0],
                    run_mora(unwrapped, wide(m), wide(x).narrow(1, 0, 550), wide(g))[0]));
}

// ---- Sizes

TEST_F(GpuKernels, EmptyInputsGiveEmptyOutputs) {
  const at::Tensor none = gpu(normal({0, 576}, at::kBFloat16)), weight = gpu(normal({576}, at::kBFloat16));
  const auto [y, rstd] = cuda::rms_norm_forward(none, weight, kEps);
  EXPECT_EQ(y.numel() + rstd.numel(), 0);
  EXPECT_EQ(cuda::rms_norm_backward(none, none, rstd, weight).numel(), 0);
  EXPECT_EQ(cuda::swiglu_forward(none, none).numel(), 0);
  EXPECT_EQ(cuda::swiglu_backward(none, none, none).second.numel(), 0);
  EXPECT_EQ(run_dropout(none, Dropout{0.1, dropout_key(1), integers(0, 1, 0), 0}).numel(), 0);
  const at::Tensor gamma = gpu(normal({576}, at::kFloat));
  const at::Tensor none_of_rank = gpu(normal({0, 8}, at::kBFloat16));
  const auto [h, dm, hu] = cuda::dora_gradients(none, none, none_of_rank, gamma, gamma);
  EXPECT_TRUE(same_values(dm, at::zeros({576})));
  EXPECT_TRUE(same_values(hu, at::zeros({576, 8})));
  cuda::scaled_low_rank_sum(none, gpu(normal({0, 8}, at::kBFloat16)), gpu(normal({576, 8}, at::kBFloat16)), 1, gamma);
  const RopeCase c = rope_case(at::kBFloat16, 0, 9, 64);
  EXPECT_EQ(run_rope(c, gpu(c.x_NHd), 1).numel(), 0);
  const auto [max, sum, target] = cuda::softmax_statistics(none, gpu(outside(0)));
  EXPECT_EQ(max.numel() + sum.numel() + target.numel(), 0);
  cuda::softmax_gradient(none, max, gpu(outside(0)));
}

/// More than 2^31 elements: the last rows must be what they are on their own.
class GpuKernelsLarge : public GpuKernels {
 protected:
  static constexpr int64_t kWidth = 4096, kCount = (int64_t{1} << 19) + 40, kLast = 3;

  static at::Tensor last(const at::Tensor& x) { return x.narrow(0, x.size(0) - kLast, kLast); }
  /// Zeros but for the last rows.
  static at::Tensor large() {
    const at::Tensor x = at::zeros({kCount, kWidth}, at::TensorOptions(at::kBFloat16).device(kGpu));
    last(x).copy_(normal({kLast, kWidth}, at::kBFloat16));
    return x;
  }
};

TEST_F(GpuKernelsLarge, RmsNorm) {
  const at::Tensor h = large(), weight = gpu(normal({kWidth}, at::kBFloat16)), tail = last(h).clone();
  const auto [y, rstd] = cuda::rms_norm_forward(h, weight, kEps);
  const auto [y_tail, rstd_tail] = cuda::rms_norm_forward(tail, weight, kEps);
  EXPECT_TRUE(same_values(last(y), y_tail) && same_values(last(rstd), rstd_tail));
  const at::Tensor dh = cuda::rms_norm_backward(y, h, rstd, weight);
  EXPECT_TRUE(same_values(last(dh), cuda::rms_norm_backward(y_tail, tail, rstd_tail, weight)));
}

TEST_F(GpuKernelsLarge, SwiGlu) {
  const at::Tensor gate = large(), up = large(), gate_tail = last(gate).clone(), up_tail = last(up).clone();
  const at::Tensor y = cuda::swiglu_forward(gate, up), y_tail = cuda::swiglu_forward(gate_tail, up_tail);
  EXPECT_TRUE(same_values(last(y), y_tail));
  const auto [dgate, dup] = cuda::swiglu_backward(y, gate, up);
  const auto [dgate_tail, dup_tail] = cuda::swiglu_backward(y_tail, gate_tail, up_tail);
  EXPECT_TRUE(same_values(last(dgate), dgate_tail) && same_values(last(dup), dup_tail));
}

TEST_F(GpuKernelsLarge, DropoutAndRope) {
  const at::Tensor x = large(), tail = last(x).clone();
  const at::Tensor slots = at::arange(kCount, at::kLong);
  for (const int64_t offset : {0, 1}) {
    EXPECT_TRUE(same_values(last(run_dropout(x, Dropout{0.1, dropout_key(1), slots, offset})),
                            run_dropout(tail, Dropout{0.1, dropout_key(1), last(slots), offset})));
  }
  RopeCase c = rope_case(at::kBFloat16, kCount, 0, 128);
  const at::Tensor y = run_rope(c, x.view({kCount, 32, 128}), 1);
  c.positions_N = last(c.positions_N).contiguous();
  EXPECT_TRUE(same_values(last(y), run_rope(c, tail.view({kLast, 32, 128}), 1)));
}

TEST_F(GpuKernelsLarge, Softmax) {
  const at::Tensor logits = large(), tail = last(logits).clone();
  const at::Tensor targets = gpu(integers(0, kWidth, kCount)), targets_tail = last(targets).clone();
  const auto [max, sum, target] = cuda::softmax_statistics(logits, targets);
  const auto [max_tail, sum_tail, target_tail] = cuda::softmax_statistics(tail, targets_tail);
  EXPECT_TRUE(same_values(last(max), max_tail) && same_values(last(sum), sum_tail) &&
              same_values(last(target), target_tail));
  cuda::softmax_gradient(logits, max, targets);
  cuda::softmax_gradient(tail, max_tail, targets_tail);
  EXPECT_TRUE(same_values(last(logits), tail));
}

TEST_F(GpuKernelsLarge, Nf4) {
  const int64_t count = kCount * kWidth, tail_count = kLast * kWidth;
  const Nf4 tail = nf4_quantise(normal({kLast, kWidth}, at::kFloat), false);
  Nf4 w{{kCount, kWidth}, {1, count, count, 0}, {}, {}, {}, {}};
  w.codes = at::zeros({count / 2}, at::TensorOptions(at::kByte).device(kGpu));
  w.codes.narrow(0, (count - tail_count) / 2, tail_count / 2).copy_(tail.codes);
  w.absmax_RB = at::zeros({1, count / kNf4Block}, at::TensorOptions(at::kFloat).device(kGpu));
  w.absmax_RB.narrow(1, (count - tail_count) / kNf4Block, tail_count / kNf4Block).copy_(tail.absmax_RB);
  EXPECT_TRUE(same_values(last(nf4_dequantise(w, at::kBFloat16)), nf4_dequantise(tail, at::kBFloat16)));
}

// ---- Broken contracts

TEST_F(GpuKernels, WrongArgumentsAreRefused) {
  const at::Tensor x = gpu(normal({7, 64}, at::kFloat)), weight = gpu(normal({64}, at::kFloat));
  EXPECT_THROW(cuda::rms_norm_forward(x.t(), weight, kEps), c10::Error);
  EXPECT_THROW(cuda::rms_norm_forward(x, weight.to(at::kBFloat16), kEps), c10::Error);
  EXPECT_THROW(cuda::rms_norm_forward(x.to(at::kDouble), weight.to(at::kDouble), kEps), c10::Error);
  EXPECT_THROW(cuda::rms_norm_forward(x.cpu(), weight, kEps), c10::Error);
  EXPECT_THROW(cuda::swiglu_forward(x, x.narrow(0, 0, 6)), c10::Error);
  EXPECT_THROW(cuda::softmax_statistics(x, gpu(outside(6))), c10::Error);
  EXPECT_THROW(run_dropout(x, Dropout{0.1, dropout_key(1), outside(6), 0}), c10::Error);
  const at::Tensor narrow = x.to(at::kBFloat16), u = gpu(normal({7, 8}, at::kBFloat16));
  EXPECT_THROW(cuda::dora_gradients(narrow, narrow, u, weight.narrow(0, 0, 63), weight), c10::Error);
  EXPECT_THROW(cuda::dora_gradients(narrow, narrow, u.narrow(1, 0, 4).contiguous(), weight, weight), c10::Error);
  ScaledSumCase twelve = scaled_sum_case(7, 64, 12);
  EXPECT_THROW(run_scaled_sum(twelve), c10::Error);
  Nf4 w = nf4_quantise(normal({7, 64}, at::kFloat), true).to(kGpu);
  EXPECT_THROW(nf4_dequantise(w, at::kHalf), c10::Error);
  w.nested_map = w.nested_map.cpu();
  EXPECT_THROW(nf4_dequantise(w, at::kFloat), c10::Error);
}

}  // namespace
}  // namespace corank::ops
