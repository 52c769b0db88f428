#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <functional>

#include "comm/backends.h"
#include "tests/support.h"
#include "trainer/layers/cross_entropy.h"
#include "trainer/layers/embedding.h"
#include "trainer/layers/projection.h"
#include "trainer/methods/diagonal_update.h"
#include "trainer/methods/dora_update.h"
#include "trainer/methods/mora_update.h"
#include "trainer/ops/adamw.h"
#include "trainer/ops/attention.h"
#include "trainer/ops/dropout.h"
#include "trainer/ops/layer_norm.h"
#include "trainer/ops/philox.h"
#include "trainer/ops/random.h"
#include "trainer/ops/recompute.h"
#include "trainer/ops/rms_norm.h"
#include "trainer/ops/rope.h"
#include "trainer/ops/swiglu.h"

// Every op in float64: forward against the plain formula, hand-written backward against finite differences.
namespace corank::ops {
namespace {

using test::relative_error;
using torch::autograd::variable_list;

const auto kDouble = at::TensorOptions(at::kDouble);

at::Tensor random(std::vector<int64_t> shape, const std::string& name, double std = 1) {
  at::Tensor t = at::empty(shape, kDouble);
  fill_normal(t, key_of(1, "test", name), 0, std, shape, std::vector<int64_t>(shape.size(), 0));
  return t;
}

at::Tensor leaf(std::vector<int64_t> shape, const std::string& name) { return random(shape, name).requires_grad_(); }

/// A trainable weight whose value follows its leaf (as a ParameterStore in float64 lays it out).
Weight trainable(const at::Tensor& leaf_tensor) { return {leaf_tensor.detach(), leaf_tensor}; }

using Function = std::function<at::Tensor()>;

/// The gradient of f at every element of every input against central differences; f reads the inputs' storage anew.
/// Returns the largest relative error over the inputs.
double gradient_error(const Function& f, const variable_list& inputs) {
  for (const at::Tensor& input : inputs) input.mutable_grad() = at::Tensor();
  torch::autograd::backward({f()}, {});
  variable_list grads;
  for (const at::Tensor& input : inputs) grads.push_back(input.grad());
  double worst = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const at::Tensor data = inputs[i].detach();  // same storage
    double* values = data.mutable_data_ptr<double>();
    at::Tensor numeric = at::empty(data.sizes(), kDouble);
    double* slopes = numeric.mutable_data_ptr<double>();
    const at::AutoGradMode no_grad(false);
    for (int64_t k = 0; k < data.numel(); ++k) {
      const double old = values[k], h = 1e-5;
      values[k] = old + h;
      const double above = f().item<double>();
      values[k] = old - h;
      const double below = f().item<double>();
      values[k] = old;
      slopes[k] = (above - below) / (2 * h);
    }
    worst = std::max(worst, relative_error(grads[i], numeric));
  }
  return worst;
}

constexpr double kGradientBound = 1e-7;

/// A scalar that weighs every output element differently.
at::Tensor weigh(const at::Tensor& y) { return (y * random(y.sizes().vec(), "weights")).sum(); }

std::shared_ptr<Update> low_rank(Weight a, Weight b, double scale, Dropout drop = {}) {
  return std::make_shared<LowRankUpdate>(LowRank{std::move(a), std::move(b), scale, std::move(drop)});
}

TEST(Linear, ForwardIsThePlainFormula) {
  const DenseMatrix w(random({6, 5}, "w"));
  const Weight a = trainable(leaf({3, 5}, "a")), b = trainable(leaf({6, 3}, "b")), bias{random({6}, "bias"), {}};
  const at::Tensor x = random({7, 5}, "x");
  const at::Tensor y = project(x, {{&w, {}, bias, low_rank(a, b, 0.7)}})[0];
  const at::Tensor plain = at::mm(x, w.dense_OI().t()) + bias.value + 0.7 * at::mm(at::mm(x, a.value.t()), b.value.t());
  EXPECT_LT(relative_error(y, plain), 1e-14);
}

TEST(Linear, GradientsOfSeveralProjectionsWithDropout) {
  const at::Tensor x = leaf({7, 5}, "x");
  const at::Tensor w1 = leaf({6, 5}, "w1"), bias1 = leaf({6}, "bias1"), w2 = random({4, 5}, "w2");
  const at::Tensor a1 = leaf({3, 5}, "a1"), b1 = leaf({6, 3}, "b1"), a2 = leaf({2, 5}, "a2"), b2 = leaf({4, 2}, "b2");
  const DenseMatrix m1(w1.detach()), m2(w2);
  Dropout drop{0.3, dropout_key(11), at::arange(7, at::TensorOptions(at::kLong)), 0};
  const auto f = [&] {
    auto y = project(x, {{&m1, w1, trainable(bias1), low_rank(trainable(a1), trainable(b1), 0.7)},
                         {&m2, {}, {}, low_rank(trainable(a2), trainable(b2), 2, drop)}});
    return weigh(y[0]) + weigh(y[1]);
  };
  EXPECT_LT(gradient_error(f, {x, w1, bias1, a1, b1, a2, b2}), kGradientBound);
}

TEST(LowRank, DiagonalForwardAndGradients) {
  const at::Tensor x = leaf({7, 5}, "x"), a = leaf({3, 5}, "a"), b = leaf({6, 3}, "b"), e = leaf({3, 1}, "e");
  const DenseMatrix w(random({6, 5}, "w"));
  for (const double p : {0.0, 0.4}) {
    const Dropout drop{p, dropout_key(3), at::arange(7, at::TensorOptions(at::kLong)), 0};
    const auto y = [&] {
      const LowRank factors{trainable(a), trainable(b), 0.7, drop};
      return project(x, {{&w, {}, {}, std::make_shared<DiagonalUpdate>(factors, trainable(e))}})[0];
    };
    const at::Tensor delta = at::mm(b, e * a) * 0.7;
    EXPECT_LT(relative_error(y(), at::mm(x, w.dense_OI().t()) + at::mm(dropout(x.detach(), drop), delta.t())), 1e-14);
    EXPECT_LT(gradient_error([&] { return weigh(y()); }, {x, a, b, e}), kGradientBound);
  }
}

/// y = diag(m / n) (W + s B A) x, dropped where methods 4.5 says so, with n given.
TEST(Dora, ForwardAndGradientsWithConstantNorms) {
  const at::Tensor x = leaf({7, 5}, "x"), a = leaf({3, 5}, "a"), b = leaf({6, 3}, "b"), m = leaf({6}, "m");
  const at::Tensor n = random({6}, "n").abs() + 0.5, bias = leaf({6}, "bias");
  const DenseMatrix w(random({6, 5}, "w"));
  for (const double p : {0.0, 0.4}) {
    const Dropout drop{p, dropout_key(3), at::arange(7, at::TensorOptions(at::kLong)), 0};
    const auto y = [&] {
      const LowRank factors{trainable(a), trainable(b), 0.7, drop};
      const MagnitudeScale scale{m, m.detach() / n, n.reciprocal(), m.detach().reciprocal()};
      return project(x, {{&w, {}, trainable(bias), std::make_shared<DoraUpdate>(factors, scale)}})[0];
    };
    const at::Tensor dropped = dropout(x.detach(), drop), gamma = m / n;
    const at::Tensor q = at::mm(dropped, (w.dense_OI() + at::mm(b, a) * 0.7).t());
    const at::Tensor plain = at::mm(x - dropped, w.dense_OI().t()) + bias + gamma * q;
    EXPECT_LT(relative_error(y(), plain), 1e-13);
    EXPECT_LT(gradient_error([&] { return weigh(y()); }, {x, a, b, m, bias}), kGradientBound);
  }
}

TEST(Dora, AMagnitudeOfZeroLearns) {
  const at::Tensor x = random({7, 5}, "x"), a = random({3, 5}, "a"), b = random({6, 3}, "b"),
                   n = at::ones({6}, kDouble);
  const at::Tensor m = at::zeros({6}, kDouble).requires_grad_();
  const DenseMatrix w(random({6, 5}, "w"));
  const MagnitudeScale scale{m, at::full({6}, 1e-20, kDouble), n, at::full({6}, 1e20, kDouble)};
  const LowRank factors{trainable(a), trainable(b), 0.7, {}};
  weigh(project(x, {{&w, {}, {}, std::make_shared<DoraUpdate>(factors, scale)}})[0]).backward();
  const at::Tensor q = at::mm(x, (w.dense_OI() + at::mm(b, a) * 0.7).t()), g = at::ones_like(q).requires_grad_();
  weigh(g).backward();
  EXPECT_LT(relative_error(m.grad(), (g.grad() * q).sum(0)), 1e-13);
}

TEST(LowRankTest, ZerosUpToAMultipleChangeNothing) {
  const at::Tensor x = leaf({7, 5}, "x"), a = leaf({3, 5}, "a"), b = leaf({6, 3}, "b");
  const DenseMatrix w(random({6, 5}, "w"));
  const LowRank factors{trainable(a), trainable(b), 0.7, {}};
  const auto y = [&](const LowRank& f) { return project(x, {{&w, {}, {}, std::make_shared<LowRankUpdate>(f)}})[0]; };
  EXPECT_EQ(padded(factors, 8).a_RI.value.size(0), 8);
  EXPECT_LT(relative_error(y(padded(factors, 8)), y(factors)), 1e-15);
  EXPECT_LT(gradient_error([&] { return weigh(y(padded(factors, 8))); }, {x, a, b}), kGradientBound);
}

TEST(Dora, NormsWithoutTheUpdateAreThoseOfTheSum) {
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    const at::Tensor w = random({64, 48}, "w").to(dtype);
    const at::Tensor w2 = random({64, 48}, "w2").to(dtype);
    const LowRank f{{random({8, 48}, "a").to(dtype), {}}, {random({64, 8}, "b").to(dtype), {}}, 2, {}};
    const LowRank f2{{random({8, 48}, "a2").to(dtype), {}}, {random({64, 8}, "b2").to(dtype), {}}, 2, {}};
    const DenseMatrix m(w), m2(w2);
    const at::Tensor base = at::stack({squared_row_norms(w, dtype), squared_row_norms(w2, dtype)});
    const at::Tensor fast = squared_row_norms(base, {&m, &m2}, {f, f2}).sqrt();
    const double bound = dtype == at::kFloat ? 1e-6 : 1e-14;
    EXPECT_LT(relative_error(fast[0], squared_row_norms_reference(w, f).sqrt()), bound);
    EXPECT_LT(relative_error(fast[1], squared_row_norms_reference(w2, f2).sqrt()), bound);
  }
}

/// Shows itself as a new tensor each time and remembers the last one without keeping it alive.
struct Watched : Matrix {
  at::Tensor unpack(Pass) const override {
    const at::Tensor w = random({6, 5}, "w");
    last = c10::weak_intrusive_ptr<c10::StorageImpl>(w.storage().getWeakStorageImpl());
    return w;
  }
  mutable c10::weak_intrusive_ptr<c10::StorageImpl> last{c10::intrusive_ptr<c10::StorageImpl>()};
};

TEST(Linear, KeepsNoWeightForBackward) {
  const Watched w;
  const at::Tensor x = leaf({7, 5}, "x"), a = leaf({3, 5}, "a"), b = leaf({6, 3}, "b");
  const auto y = project(x, {{&w, {}, {}, low_rank(trainable(a), trainable(b), 1)}});
  EXPECT_TRUE(w.last.expired());
  torch::autograd::backward({weigh(y[0])}, {});
  EXPECT_TRUE(a.grad().defined() && b.grad().defined() && x.grad().defined());
}

/// Forward against the dense matrix of the index formulas, gradients against finite differences, for shapes with and
/// without padding, and the sum of two ranks' parts against one rank.
TEST(Mora, EveryTypeIsItsDenseMatrix) {
  using enum Grouping;
  const std::pair<Grouping, Grouping> types[] = {
      {modulo, modulo}, {block, block}, {block, modulo}, {modulo, block}, {rotate, rotate}};
  for (const auto& [compress, decompress] : types) {
    for (const auto& [in, out, r] : {std::tuple{12, 12, 6}, {10, 14, 4}, {14, 8, 6}, {8, 20, 6}, {12, 18, 4}}) {
      const at::Tensor x = leaf({5, in}, "x"), m = leaf({r, r}, "m");
      const DenseMatrix w(random({out, in}, "w"));
      const Dropout drop{0.3, dropout_key(5), at::arange(5, at::TensorOptions(at::kLong)), 0};
      for (const Dropout& dropout_ : {Dropout{}, drop}) {
        const Rotation turn = rotation_of(r, in, out, kDouble);
        const Mora whole{trainable(m), compress, decompress, {in, 0, in}, {out, 0, out}, dropout_, turn};
        const auto y = [&] { return project(x, {{&w, {}, {}, std::make_shared<MoraUpdate>(whole)}})[0]; };
        const at::Tensor delta = mora_delta(m.detach(), compress, decompress, in, out);
        const at::Tensor plain = at::mm(x, w.dense_OI().t()) + at::mm(dropout(x.detach(), dropout_), delta.t());
        EXPECT_LT(relative_error(y(), plain), compress == rotate ? 1e-6 : 1e-13);
        EXPECT_LT(gradient_error([&] { return weigh(y()); }, {x, m}), kGradientBound);
      }
      for (const bool row : {false, true}) {
        at::Tensor sum;
        for (const int64_t rank : {0, 1}) {
          const int64_t half_in = in / 2, half_out = out / 2;
          const Extent i = row ? Extent{in, rank * half_in, half_in} : Extent{in, 0, in};
          const Extent o = row ? Extent{out, 0, out} : Extent{out, rank * half_out, half_out};
          const DenseMatrix none(at::zeros({o.length, i.length}, at::kDouble));
          const Rotation turn = rotation_of(r, in, out, kDouble);
          const Mora part{trainable(m), compress, decompress, i, o, Dropout{}, turn};
          const at::Tensor y =
              project(x.narrow(1, i.start, i.length), {{&none, {}, {}, std::make_shared<MoraUpdate>(part)}})[0];
          sum = !sum.defined() ? y : row ? sum + y : at::cat({sum, y}, 1);
        }
        EXPECT_LT(relative_error(sum, at::mm(x, mora_delta(m.detach(), compress, decompress, in, out).t())), 1e-6);
      }
    }
  }
}

TEST(RmsNorm, ForwardAndGradients) {
  const at::Tensor h = leaf({4, 6}, "h"), delta = leaf({4, 6}, "delta"), w = leaf({6}, "w");
  const auto [sum, y] = add_rms_norm(h, delta, trainable(w), 1e-5);
  const at::Tensor plain = h + delta;
  EXPECT_TRUE(at::equal(sum, plain));
  EXPECT_LT(relative_error(y, plain * (plain.square().mean(-1, true) + 1e-5).rsqrt() * w), 1e-14);
  const auto f = [&] {
    const auto [s, z] = add_rms_norm(h, delta, trainable(w), 1e-5);
    return weigh(s * s) + weigh(z);
  };
  EXPECT_LT(gradient_error(f, {h, delta, w}), kGradientBound);
  const auto first = [&] { return weigh(add_rms_norm(h, {}, trainable(w), 1e-5).second); };
  EXPECT_LT(gradient_error(first, {h, w}), kGradientBound);
}

TEST(LayerNorm, ForwardAndGradients) {
  const at::Tensor h = leaf({4, 6}, "h"), delta = leaf({4, 6}, "delta"), w = leaf({6}, "w"), b = leaf({6}, "b");
  const auto [sum, y] = add_layer_norm(h, delta, trainable(w), trainable(b), 1e-5);
  const at::Tensor plain = h + delta, centred = plain - plain.mean(-1, true);
  EXPECT_TRUE(at::equal(sum, plain));
  EXPECT_LT(relative_error(y, centred * (centred.square().mean(-1, true) + 1e-5).rsqrt() * w + b), 1e-14);
  const auto f = [&] {
    const auto [s, z] = add_layer_norm(h, delta, trainable(w), trainable(b), 1e-5);
    return weigh(s * s) + weigh(z);
  };
  EXPECT_LT(gradient_error(f, {h, delta, w, b}), kGradientBound);
  const Weight frozen_w{w.detach(), {}}, frozen_b{b.detach(), {}};
  const auto first = [&] { return weigh(add_layer_norm(h, {}, frozen_w, frozen_b, 1e-5).second); };
  EXPECT_LT(gradient_error(first, {h}), kGradientBound);
}

TEST(LayerNorm, KeepsStatisticsOfBFloat16RowsInFloat32) {
  const at::Tensor x = (random({16, 64}, "x") + 20).to(at::kBFloat16).requires_grad_();
  const Weight w{random({64}, "w").to(at::kBFloat16), {}}, b{random({64}, "b").to(at::kBFloat16), {}};
  const at::Tensor wide = x.detach().to(at::kDouble).requires_grad_();
  const Weight wide_w{w.value.to(at::kDouble), {}}, wide_b{b.value.to(at::kDouble), {}};
  const at::Tensor y = add_layer_norm(x, {}, w, b, 1e-5).second,
                   z = add_layer_norm(wide, {}, wide_w, wide_b, 1e-5).second;
  EXPECT_LT(relative_error(y, z), 4e-3);
  const at::Tensor g = random({16, 64}, "g");
  EXPECT_LT(relative_error(torch::autograd::grad({y}, {x}, {g.to(at::kBFloat16)})[0],
                           torch::autograd::grad({z}, {wide}, {g})[0]),
            1e-2);
}

TEST(Rope, TurnsPairsAndBackwardTurnsBack) {
  const at::Tensor q = leaf({5, 3, 4}, "q"), k = leaf({5, 1, 4}, "k");
  const at::Tensor angle = random({9, 2}, "angle"),
                   positions = at::tensor({0, 3, 1, 8, 2}, at::TensorOptions(at::kLong));
  const at::Tensor cos = angle.cos(), sin = angle.sin();
  const auto [turned, unused] = rope(q, k, cos, sin, positions);
  const auto x = q.detach(), y = turned.detach();
  const double c = cos[3][1].item<double>(), s = sin[3][1].item<double>();
  EXPECT_NEAR(y[1][2][1].item<double>(), x[1][2][1].item<double>() * c - x[1][2][3].item<double>() * s, 1e-14);
  EXPECT_NEAR(y[1][2][3].item<double>(), x[1][2][3].item<double>() * c + x[1][2][1].item<double>() * s, 1e-14);
  const auto f = [&] {
    const auto [a, b] = rope(q, k, cos, sin, positions);
    return weigh(a) + weigh(b);
  };
  EXPECT_LT(gradient_error(f, {q, k}), kGradientBound);
}

TEST(SwiGlu, ForwardAndGradients) {
  const at::Tensor gate = leaf({4, 5}, "gate"), up = leaf({4, 5}, "up");
  EXPECT_LT(relative_error(swiglu(gate, up), gate * at::sigmoid(gate) * up), 1e-14);
  EXPECT_LT(gradient_error([&] { return weigh(swiglu(gate, up)); }, {gate, up}), kGradientBound);
}

Segments segments_of(std::vector<int64_t> lengths) {
  std::vector<int64_t> ends{0};
  for (const int64_t length : lengths) ends.push_back(ends.back() + length);
  return {at::tensor(ends, at::kLong).to(at::kInt), lengths, *std::max_element(lengths.begin(), lengths.end())};
}

TEST(Attention, IsThePlainFormulaWithGroupedQueries) {
  const at::Tensor q = leaf({9, 4, 6}, "q"), k = leaf({9, 2, 6}, "k"), v = leaf({9, 2, 6}, "v");
  const Segments s = segments_of({4, 1, 4});
  EXPECT_LT(relative_error(attention(q, k, v, s, {0.4}), attention_reference(q, k, v, s, {0.4})), 1e-13);
  EXPECT_LT(gradient_error([&] { return weigh(attention(q, k, v, s, {0.4})); }, {q, k, v}), kGradientBound);
}

TEST(Attention, NothingCrossesSegmentsOrComesFromTheFuture) {
  const at::Tensor q = random({6, 2, 4}, "q"), k = random({6, 2, 4}, "k"), v = random({6, 2, 4}, "v");
  const Segments s = segments_of({3, 3});
  const at::Tensor before = attention(q, k, v, s, {1});
  k.narrow(0, 2, 1).mul_(5);
  v.narrow(0, 2, 1).add_(3);
  const at::Tensor after = attention(q, k, v, s, {1});
  EXPECT_TRUE(at::equal(before.narrow(0, 0, 2), after.narrow(0, 0, 2)));  // earlier tokens
  EXPECT_TRUE(at::equal(before.narrow(0, 3, 3), after.narrow(0, 3, 3)));  // the other segment
  EXPECT_FALSE(at::equal(before[2], after[2]));
}

TEST(Attention, CachedIsTheLastRows) {
  const at::Tensor q = random({6, 4, 4}, "q"), k = random({6, 2, 4}, "k"), v = random({6, 2, 4}, "v");
  const at::Tensor all = attention_reference(q, k, v, segments_of({6}), {0.5});
  EXPECT_LT(relative_error(cached_attention(q.narrow(0, 4, 2), k, v, {0.5}), all.narrow(0, 4, 2)), 1e-14);
}

/// The plain formula itself: each token's softmax over the keys that the window leaves.
TEST(Attention, AWindowHoldsTheTokenAndTheOnesBeforeIt) {
  const at::Tensor q = leaf({12, 4, 6}, "q"), k = leaf({12, 2, 6}, "k"), v = leaf({12, 2, 6}, "v");
  const Segments s = segments_of({7, 2, 3});
  const AttentionRule rule{0.4, 3};
  const at::Tensor y = attention(q, k, v, s, rule).view({12, 4, 6});
  for (const int64_t token : {0, 1, 2, 3, 6, 8, 11}) {
    const int64_t segment = token < 7 ? 0 : token < 9 ? 7 : 9, first = std::max(segment, token - 2);
    const at::Tensor keys = k.narrow(0, first, token + 1 - first), values = v.narrow(0, first, token + 1 - first);
    const at::Tensor p = at::softmax(at::mv(keys.select(1, 1), q[token][2]) * 0.4, 0);
    EXPECT_LT(relative_error(y[token][2], at::mv(values.select(1, 1).t(), p)), 1e-13) << token;
  }
  EXPECT_LT(relative_error(y, attention_reference(q, k, v, s, rule).view({12, 4, 6})), 1e-13);
  EXPECT_LT(gradient_error([&] { return weigh(attention(q, k, v, s, rule)); }, {q, k, v}), kGradientBound);
  const at::Tensor last = cached_attention(q.narrow(0, 5, 2), k.narrow(0, 0, 7), v.narrow(0, 0, 7), rule);
  EXPECT_LT(relative_error(last.view({2, 4, 6}), y.narrow(0, 5, 2)), 1e-13);
}

/// The plain formula itself: each token's softmax over all keys of its segment, those behind it too.
TEST(Attention, WithoutCausalityATokenSeesItsWholeSegment) {
  const at::Tensor q = leaf({9, 4, 6}, "q"), k = leaf({9, 2, 6}, "k"), v = leaf({9, 2, 6}, "v");
  const Segments s = segments_of({4, 1, 4});
  AttentionRule rule{0.4};
  rule.causal = false;
  const at::Tensor y = attention(q, k, v, s, rule).view({9, 4, 6});
  for (const int64_t token : {0, 2, 4, 5, 8}) {
    const int64_t first = token < 4 ? 0 : token < 5 ? 4 : 5, length = token == 4 ? 1 : 4;
    const at::Tensor keys = k.narrow(0, first, length), values = v.narrow(0, first, length);
    const at::Tensor p = at::softmax(at::mv(keys.select(1, 1), q[token][2]) * 0.4, 0);
    EXPECT_LT(relative_error(y[token][2], at::mv(values.select(1, 1).t(), p)), 1e-13) << token;
  }
  EXPECT_GT(relative_error(y, attention(q, k, v, s, {0.4}).view({9, 4, 6})), 0.1);
  EXPECT_LT(relative_error(y, attention_reference(q, k, v, s, rule).view({9, 4, 6})), 1e-13);
  EXPECT_LT(gradient_error([&] { return weigh(attention(q, k, v, s, rule)); }, {q, k, v}), kGradientBound);
  rule.window = 3;
  EXPECT_THROW(attention(q, k, v, s, rule), c10::Error);
}

/// Dropout of probabilities: the plain formula with a mask that depends on query, head and key alone.
TEST(Attention, DropoutHasTheSameMaskInEveryLayout) {
  const at::Tensor q = leaf({7, 4, 6}, "q"), k = leaf({7, 2, 6}, "k"), v = leaf({7, 2, 6}, "v");
  AttentionRule rule{0.4};
  rule.dropout = {0.3, dropout_key(5), at::arange(20, 27, at::TensorOptions(at::kLong)), 0};
  const at::Tensor all = attention(q, k, v, segments_of({3, 4}), rule).view({7, 4, 6});
  EXPECT_GT(relative_error(attention(q, k, v, segments_of({3, 4}), {0.4}).view({7, 4, 6}), all), 0.1);
  // the second segment and the last two heads alone: another micro-batch, another tensor-parallel rank
  AttentionRule part = rule;
  part.dropout.slots_N = rule.dropout.slots_N.narrow(0, 3, 4);
  part.first_head = 2;
  const auto heads = [](const at::Tensor& x, int64_t first, int64_t count) {
    return x.narrow(0, 3, 4).narrow(1, first, count).contiguous();
  };
  const at::Tensor alone = attention(heads(q, 2, 2), heads(k, 1, 1), heads(v, 1, 1), segments_of({4}), part);
  EXPECT_LT(relative_error(alone.view({4, 2, 6}), heads(all, 2, 2)), 1e-14);
  const auto f = [&] { return weigh(attention(q, k, v, segments_of({3, 4}), rule)); };
  EXPECT_LT(gradient_error(f, {q, k, v}), kGradientBound);
}

class CrossEntropyTest : public testing::Test {
 protected:
  at::Tensor plain(const at::Tensor& h, const at::Tensor& w) const {
    const at::Tensor logits = at::mm(h.index_select(0, rows_), w.narrow(0, 0, kVocab).t());
    return -at::log_softmax(logits, 1).gather(1, targets_.unsqueeze(1)).sum();
  }
  VocabularyHead head(const Weight& w) const { return {w, 0, kVocab}; }

  static constexpr int64_t kVocab = 11;
  at::Tensor rows_ = at::tensor({0, 2, 3, 6}, at::TensorOptions(at::kLong));
  at::Tensor targets_ = at::tensor({10, 0, 4, 4}, at::TensorOptions(at::kLong));
  Ledger ledger_;
  std::unique_ptr<Communicator> solo_ = make_solo_communicator(at::kCPU, ledger_);
};

TEST_F(CrossEntropyTest, ForwardAndGradientsInAnyChunk) {
  const at::Tensor h = leaf({7, 5}, "h"), w = leaf({12, 5}, "w");  // row 11 is padding
  for (const int64_t chunk : {1, 3, 100}) {
    const auto f = [&] { return cross_entropy(h, rows_, targets_, head(trainable(w)), *solo_, chunk); };
    EXPECT_LT(relative_error(f(), plain(h, w)), 1e-13);
    EXPECT_LT(gradient_error(f, {h, w}), kGradientBound);
  }
}

TEST_F(CrossEntropyTest, ScoreIsTheLossAndTheTargetsThatNoLogitExceeds) {
  const at::Tensor h = random({7, 5}, "h"), w = random({12, 5}, "w");
  at::Tensor best = at::mm(h.index_select(0, rows_), w.narrow(0, 0, kVocab).t()).argmax(1);
  for (int64_t found = 0; found <= 4; ++found) {
    targets_ = at::cat({best.narrow(0, 0, found), (best.narrow(0, found, 4 - found) + 1).remainder(kVocab)});
    for (const int64_t chunk : {1, 3, 100}) {
      const at::Tensor sums = score(h, rows_, targets_, head({w, {}}), *solo_, chunk);
      EXPECT_LT(relative_error(sums[0], plain(h, w)), 1e-13);
      EXPECT_EQ(sums[1].item<double>(), static_cast<double>(found));
    }
  }
}

TEST_F(CrossEntropyTest, NoTargetsIsZeroWithoutGradient) {
  const at::Tensor h = leaf({7, 5}, "h"), none = at::empty({0}, at::TensorOptions(at::kLong));
  const at::Tensor loss = cross_entropy(h, none, none, head({random({12, 5}, "w"), {}}), *solo_);
  torch::autograd::backward({loss}, {});
  EXPECT_EQ(loss.item<double>(), 0);
  EXPECT_EQ(h.grad().abs().sum().item<double>(), 0);
}

TEST_F(CrossEntropyTest, EmbeddingGradients) {
  const at::Tensor w = leaf({6, 3}, "table"), tokens = at::tensor({5, 0, 5, 2}, at::TensorOptions(at::kLong));
  EXPECT_TRUE(at::equal(embedding(tokens, trainable(w), 0, *solo_), w.index_select(0, tokens)));
  EXPECT_LT(gradient_error([&] { return weigh(embedding(tokens, trainable(w), 0, *solo_)); }, {w}), kGradientBound);
}

TEST(Lookup, Gradients) {
  const at::Tensor w = leaf({6, 3}, "table"), rows = at::tensor({5, 0, 5, 2}, at::TensorOptions(at::kLong));
  EXPECT_TRUE(at::equal(lookup(rows, trainable(w)), w.index_select(0, rows)));
  EXPECT_LT(gradient_error([&] { return weigh(lookup(rows, trainable(w))); }, {w}), kGradientBound);
}

TEST(Recompute, GivesTheSameGradientsWithoutKeepingActivations) {
  const at::Tensor x = leaf({4, 6}, "x"), w = leaf({6}, "w");
  int runs = 0;
  const Block block = [&](const variable_list& in) {
    ++runs;
    return variable_list{add_rms_norm(in[0], {}, trainable(w), 1e-5).second.square()};
  };
  torch::autograd::backward({weigh(block({x})[0])}, {});
  const at::Tensor direct_x = x.grad().clone(), direct_w = w.grad().clone();
  x.mutable_grad() = w.mutable_grad() = at::Tensor();
  const at::Tensor loss = weigh(recompute(block, {x})[0]);
  torch::autograd::backward({loss}, {});
  EXPECT_EQ(runs, 3);
  EXPECT_TRUE(at::equal(x.grad(), direct_x));
  EXPECT_TRUE(at::equal(w.grad(), direct_w));
}

TEST(Recompute, TrainsLeavesWhereNoInputRequiresGrad) {
  const at::Tensor x = random({4, 6}, "x"), w = leaf({6}, "w");
  const Block block = [&](const variable_list& in) {
    return variable_list{add_rms_norm(in[0], {}, trainable(w), 1e-5).second};
  };
  torch::autograd::backward({weigh(recompute(block, {x})[0])}, {});
  EXPECT_TRUE(w.grad().defined());
}

/// Known answers of Random123's kat_vectors for philox4x32-10.
TEST(Philox, KnownAnswers) {
  const Philox4 zeros = philox(0, 0, 0), ones = philox(~0ull, ~0ull, ~0ull);
  EXPECT_EQ(zeros.v[0], 0x6627e8d5u);
  EXPECT_EQ(zeros.v[1], 0xe169c58du);
  EXPECT_EQ(zeros.v[2], 0xbc57ac4cu);
  EXPECT_EQ(zeros.v[3], 0x9b00dbd8u);
  EXPECT_EQ(ones.v[0], 0x408f276du);
  EXPECT_EQ(ones.v[3], 0x6d5451fdu);
}

TEST(Random, AShardIsItsPartOfTheWhole) {
  const auto draw = [](std::vector<int64_t> shape, std::vector<int64_t> offset) {
    at::Tensor t = at::empty(shape, kDouble);
    fill_uniform(t, 5, -1, 1, {8, 6}, offset);
    return t;
  };
  const at::Tensor whole = draw({8, 6}, {0, 0});
  EXPECT_TRUE(at::equal(draw({4, 6}, {4, 0}), whole.narrow(0, 4, 4)));
  EXPECT_TRUE(at::equal(draw({8, 3}, {0, 3}), whole.narrow(1, 3, 3)));
  EXPECT_FALSE(at::equal(draw({8, 3}, {0, 0}), whole.narrow(1, 3, 3)));
}

TEST(Random, MomentsAreRight) {
  at::Tensor uniform = at::empty({100000}, kDouble), normal = at::empty({100000}, kDouble);
  fill_uniform(uniform, 1, -2, 2, {100000}, {0});
  fill_normal(normal, 2, 1, 3, {100000}, {0});
  EXPECT_NEAR(uniform.mean().item<double>(), 0, 4 * 2 / std::sqrt(3e5));
  EXPECT_NEAR(uniform.std().item<double>(), 2 / std::sqrt(3.0), 0.01);
  EXPECT_NEAR(normal.mean().item<double>(), 1, 4 * 3 / std::sqrt(1e5));
  EXPECT_NEAR(normal.std().item<double>(), 3, 0.03);
}

TEST(DropoutTest, KeepsTheRightShareAndScalesIt) {
  const int64_t rows = 200, width = 500;
  const Dropout d{0.1, dropout_key(99), at::arange(rows, at::TensorOptions(at::kLong)), 0};
  const at::Tensor y = dropout(at::ones({rows, width}, kDouble), d);
  const auto kept = y.ne(0).sum().item<double>();
  EXPECT_NEAR(kept, 0.9 * rows * width, 4 * std::sqrt(0.09 * rows * width));
  EXPECT_NEAR(y.max().item<double>(), 1 / 0.9, 1e-6);
  EXPECT_NEAR(y.mean().item<double>(), 1, 4 * std::sqrt(0.1 / 0.9 / (rows * width)));
}

TEST(DropoutTest, DependsOnTokenAndFeatureNotOnWhereTheyStand) {
  const at::Tensor slots = at::tensor({4, 9, 2}, at::TensorOptions(at::kLong)), x = at::ones({3, 10}, kDouble);
  const at::Tensor whole = dropout(x, {0.5, dropout_key(7), slots, 0});
  EXPECT_TRUE(at::equal(dropout(x.narrow(1, 3, 7), {0.5, dropout_key(7), slots, 3}), whole.narrow(1, 3, 7)));
  EXPECT_TRUE(
      at::equal(dropout(x.narrow(0, 1, 1), {0.5, dropout_key(7), slots.narrow(0, 1, 1), 0}), whole.narrow(0, 1, 1)));
  EXPECT_FALSE(at::equal(dropout(x, {0.5, dropout_key(8), slots, 0}), whole));
  EXPECT_TRUE(dropout(x, {}).is_same(x));
}

TEST(AdamWTest, FusedIsThePlainFormula) {
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    std::vector<at::Tensor> fused, plain;
    for (auto* set : {&fused, &plain}) {
      *set = {random({50}, "p").to(dtype), at::zeros({50}, dtype), at::zeros({50}, dtype)};
    }
    const at::Tensor rate = adamw_learning_rate(fused[0]).fill_(1e-2), goes = at::zeros({}, at::kFloat);
    for (int64_t step = 1; step <= 5; ++step) {
      const at::Tensor g = random({50}, "g" + std::to_string(step)).to(dtype);
      adamw(fused[0], g, fused[1], fused[2], rate, 0.1, at::full({}, step, at::kFloat), {}, goes);
      adamw(fused[0], g, fused[1], fused[2], rate, 0.1, at::full({}, step, at::kFloat), {}, goes + 1);  // nothing
      adamw_reference(plain[0], g, plain[1], plain[2], 1e-2, 0.1, step, {});
    }
    for (int i = 0; i < 3; ++i) EXPECT_LT(relative_error(fused[i], plain[i]), dtype == at::kFloat ? 1e-6 : 1e-14);
  }
}

}  // namespace
}  // namespace corank::ops
