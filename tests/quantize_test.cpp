#include "trainer/ops/quantize.h"

#include <bit>
#include <cmath>
#include <nlohmann/json.hpp>

#include "data/file.h"
#include "data/safetensors.h"
#include "data/storage.h"
#include "data/weight_file.h"
#include "tests/support.h"
#include "trainer/methods/pissa.h"
#include "trainer/weights/frozen_weight.h"

// Against plain arithmetic, one weight at a time, from the formulas of methods 6. Equal means equal bits.
namespace corank::test {
namespace {

using nlohmann::json;
using ops::Nf4;

at::Tensor normal(at::IntArrayRef shape, at::ScalarType dtype = at::kFloat) {
  at::manual_seed(11);
  return (at::randn(shape, at::TensorOptions(at::kDouble)) * 0.02).to(dtype);
}

std::vector<float> floats(const at::Tensor& t) {
  const at::Tensor flat = t.to(at::kFloat).contiguous();
  return {flat.const_data_ptr<float>(), flat.const_data_ptr<float>() + flat.numel()};
}

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() && at::equal(a, b);
}

// ---- The plain form

/// Index of the nearest value; the lower one of two that are equally near.
int nearest(float v, const std::vector<float>& values) {
  int index = 0;
  while (index + 1 < static_cast<int>(values.size()) && v > (values[index] + values[index + 1]) * 0.5F) ++index;
  return index;
}

struct Plain {
  std::vector<int> codes;
  std::vector<float> absmax;
};

Plain quantise_plainly(const std::vector<float>& w, const std::vector<float>& values, size_t block) {
  Plain result;
  for (size_t begin = 0; begin < w.size(); begin += block) {
    const size_t end = std::min(w.size(), begin + block);
    float absmax = 0;
    for (size_t i = begin; i < end; ++i) absmax = std::max(absmax, std::fabs(w[i]));
    result.absmax.push_back(absmax);
    for (size_t i = begin; i < end; ++i) {
      result.codes.push_back(nearest(absmax > 0 ? w[i] * (1 / absmax) : 0, values));
    }
  }
  return result;
}

const std::vector<float> kValues(ops::kNf4Values.begin(), ops::kNf4Values.end());

/// absmax after double quantisation, rounded after each operation.
std::vector<float> round_statistics(std::vector<float> absmax) {
  const std::vector<float> map = floats(ops::nf4_nested_map());
  double sum = 0;
  for (const float a : absmax) sum += a;
  const auto offset = static_cast<float>(sum / static_cast<double>(absmax.size()));
  for (float& a : absmax) a -= offset;
  const Plain nested = quantise_plainly(absmax, map, 256);
  for (size_t i = 0; i < absmax.size(); ++i) {
    volatile const float product = map[nested.codes[i]] * nested.absmax[i / 256];
    absmax[i] = product + offset;
  }
  return absmax;
}

at::Tensor round_trip_plainly(const at::Tensor& w_OI, bool double_quant) {
  const Plain plain = quantise_plainly(floats(w_OI), kValues, 64);
  const std::vector<float> absmax = double_quant ? round_statistics(plain.absmax) : plain.absmax;
  at::Tensor out = at::empty({w_OI.numel()}, at::kFloat);
  for (int64_t i = 0; i < w_OI.numel(); ++i) out[i].fill_(kValues[plain.codes[i]] * absmax[i / 64]);
  return out.view(w_OI.sizes());
}

int code_at(const Nf4& w, int64_t i) {
  const int byte = w.codes.const_data_ptr<uint8_t>()[i / 2];
  return i % 2 == 0 ? byte / 16 : byte % 16;
}

// ---- NF4

TEST(Nf4Values, HaveBitsandbytesBits) {
  const std::vector<uint32_t> bits{0xbf800000, 0xbf3239b1, 0xbf066b30, 0xbeca32a0, 0xbe91a24d, 0xbe3d353f,
                                   0xbdba7871, 0x00000000, 0x3da2faff, 0x3e24cae3, 0x3e7c04dd, 0x3ead033a,
                                   0x3ee1a4b8, 0x3f1007ab, 0x3f3913b3, 0x3f800000};
  for (size_t i = 0; i < bits.size(); ++i) EXPECT_EQ(std::bit_cast<uint32_t>(kValues[i]), bits[i]) << i;
}

TEST(Nf4Quantise, TiesGoToTheLowerIndex) {
  for (int k = 0; k < 15; ++k) {
    const float midpoint = (kValues[k] + kValues[k + 1]) * 0.5F;
    const Nf4 w =
        ops::nf4_quantise(at::tensor({1.0F, midpoint, std::nextafter(midpoint, 2.0F), kValues[k]}).view({1, 4}), false);
    EXPECT_EQ(code_at(w, 0), 15);
    EXPECT_EQ(code_at(w, 1), k);
    EXPECT_EQ(code_at(w, 2), k + 1);
    EXPECT_EQ(code_at(w, 3), k);
  }
}

TEST(Nf4Quantise, MultipliesByTheReciprocal) {
  int differ = 0;
  for (int step = 0; step < 200000 && differ == 0; ++step) {
    const float absmax = 1.5F + 1e-5F * static_cast<float>(step);
    for (int k = 0; k < 15 && differ == 0; ++k) {
      const float x = (kValues[k] + kValues[k + 1]) * 0.5F * absmax;
      const int by_product = nearest(x * (1 / absmax), kValues), by_quotient = nearest(x / absmax, kValues);
      if (by_product == by_quotient) continue;
      ++differ;
      EXPECT_EQ(code_at(ops::nf4_quantise(at::tensor({absmax, x}).view({1, 2}), false), 1), by_product);
    }
  }
  EXPECT_EQ(differ, 1) << "no case that tells them apart";
}

TEST(Nf4Quantise, EvenElementInTheHighNibbleAndPaddingOfZero) {
  const Nf4 w = ops::nf4_quantise(at::tensor({1.0F, -1.0F, 1.0F}).view({1, 3}), false);
  ASSERT_EQ(w.codes.numel(), 2);
  EXPECT_EQ(w.codes[0].item<int>(), 0xF0);
  EXPECT_EQ(w.codes[1].item<int>(), 0xF7);
}

TEST(Nf4Quantise, ZerosTailsAndTinyBlocksComeBack) {
  at::Tensor w = at::zeros({1, 150});
  w.narrow(1, 64, 64).fill_(1e-41);  // its reciprocal would be infinite
  w.narrow(1, 128, 22).fill_(-3);
  const at::Tensor back = ops::nf4_dequantise(ops::nf4_quantise(w, false), at::kFloat);
  EXPECT_TRUE(at::equal(back.narrow(1, 0, 64), w.narrow(1, 0, 64)));
  EXPECT_TRUE(back.isfinite().all().item<bool>());
  EXPECT_LE((back - w).abs().max().item<double>(), 1e-41);
  EXPECT_TRUE(at::equal(back.narrow(1, 128, 22), w.narrow(1, 128, 22)));
}

TEST(Nf4NestedMap, FollowsTheFormula) {
  std::vector<double> expected{0, 1};
  for (int i = 0; i < 7; ++i) {
    for (int k = 0; k < 1 << i; ++k) {
      const double value = (0.1 + 0.9 * (k + 0.5) / (1 << i)) * std::pow(10, i - 6);
      expected.push_back(value);
      expected.push_back(-value);
    }
  }
  std::sort(expected.begin(), expected.end());
  const std::vector<float> map = floats(ops::nf4_nested_map());
  ASSERT_EQ(map.size(), 256u);
  for (size_t i = 0; i < map.size(); ++i) EXPECT_NEAR(map[i], expected[i], std::abs(expected[i]) * 2e-7) << i;
  EXPECT_TRUE(std::is_sorted(map.begin(), map.end()));
  EXPECT_EQ(map[127], 0);
  EXPECT_EQ(map[0], -0.99296874F);
  EXPECT_EQ(map[255], 1);
}

struct Case {
  std::vector<int64_t> shape;
  at::ScalarType dtype;
};

TEST(Nf4, IsThePlainFormToTheBit) {
  const std::vector<Case> cases{{{64, 64}, at::kFloat}, {{172, 64}, at::kBFloat16}, {{64, 172}, at::kHalf},
                                {{7, 33}, at::kFloat},  {{1, 1}, at::kDouble},      {{300, 130}, at::kBFloat16}};
  for (const auto& [shape, dtype] : cases) {
    const at::Tensor w = normal(shape, dtype);
    const Plain plain = quantise_plainly(floats(w), kValues, 64);
    for (const bool double_quant : {false, true}) {
      const Nf4 quantised = ops::nf4_quantise(w, double_quant);
      for (int64_t i = 0; i < w.numel(); ++i) ASSERT_EQ(code_at(quantised, i), plain.codes[i]) << w.sizes() << " " << i;
      const at::Tensor expected = round_trip_plainly(w, double_quant);
      for (const at::ScalarType to : {at::kFloat, at::kBFloat16, at::kDouble}) {
        EXPECT_TRUE(same_bits(ops::nf4_dequantise(quantised, to), expected.to(to))) << w.sizes() << to << double_quant;
      }
    }
  }
}

TEST(Nf4, TakesTheBitsAndHasTheErrorOfThePaper) {
  const at::Tensor w = normal({1024, 1024});
  const Nf4 plain = ops::nf4_quantise(w, false), nested = ops::nf4_quantise(w, true);
  EXPECT_EQ(plain.bytes() * 8, w.numel() * 9 / 2);
  EXPECT_NEAR(static_cast<double>(nested.bytes() - 1024) * 8 / static_cast<double>(w.numel()), 4.127, 1e-3);
  for (const Nf4& quantised : {plain, nested}) {
    EXPECT_NEAR(relative_error(ops::nf4_dequantise(quantised, at::kFloat), w), 9.2e-2, 1e-3);
  }
}

// ---- Slices

/// Aligned and misaligned to blocks of 64, odd sizes, more than one nested block.
const std::vector<std::vector<int64_t>> kShapes{{64, 256}, {64, 172}, {176, 64}, {12, 44},
                                                {8, 20},   {6, 33},   {512, 160}};

template <class Check>
void for_slices(const Check& check) {
  for (const auto& shape : kShapes) {
    for (const int64_t dim : {0, 1}) {
      for (const int64_t ranks : {2, 3, 4}) {
        const int64_t length = shape[dim] / ranks;
        if (shape[dim] % ranks != 0) continue;
        for (int64_t rank = 0; rank < ranks; ++rank) {
          SCOPED_TRACE(testing::Message()
                       << shape[0] << "x" << shape[1] << " dim " << dim << " " << rank << "/" << ranks);
          check(normal(shape), dim, rank * length, length);
        }
      }
    }
  }
}

TEST(Nf4Narrow, IsThePartOfTheWhole) {
  for_slices([](const at::Tensor& w, int64_t dim, int64_t start, int64_t length) {
    for (const bool double_quant : {false, true}) {
      const Nf4 full = ops::nf4_quantise(w, double_quant), part = ops::nf4_narrow(full, dim, start, length);
      EXPECT_EQ(part.codes.numel(), (w.numel() / w.size(dim) * length + 1) / 2);
      for (const at::ScalarType to : {at::kFloat, at::kBFloat16}) {
        EXPECT_TRUE(same_bits(ops::nf4_dequantise(part, to), ops::nf4_dequantise(full, to).narrow(dim, start, length)));
      }
    }
  });
}

TEST(Nf4Narrow, QuantisingThePartsIsSomethingElse) {
  const auto parts_differ = [](std::vector<int64_t> shape, int64_t dim, bool double_quant) {
    const at::Tensor w = normal(shape), part = w.narrow(dim, 0, w.size(dim) / 2);
    const at::Tensor whole = ops::nf4_dequantise(ops::nf4_quantise(w, double_quant), at::kFloat);
    const at::Tensor alone = ops::nf4_dequantise(ops::nf4_quantise(part, double_quant), at::kFloat);
    return !at::equal(alone, whole.narrow(dim, 0, part.size(dim)));
  };
  EXPECT_FALSE(parts_differ({64, 256}, 1, false)) << "a cut between blocks, without nested statistics";
  EXPECT_TRUE(parts_differ({64, 256}, 1, true)) << "the offset";
  EXPECT_TRUE(parts_differ({64, 172}, 1, false)) << "a cut within blocks";
  EXPECT_TRUE(parts_differ({12, 44}, 0, true));
}

// ---- int8

TEST(Int8, IsThePlainFormWithinHalfAScale) {
  at::Tensor w = normal({37, 65});
  w[3].zero_();
  w[4].fill_(1e-43);  // a scale that is not exact
  const ops::Int8 quantised = ops::int8_quantise(w);
  const at::Tensor back = ops::int8_dequantise(quantised, at::kFloat);
  for (int64_t row = 0; row < w.size(0); ++row) {
    const std::vector<float> values = floats(w[row]);
    float absmax = 0;
    for (const float v : values) absmax = std::max(absmax, std::fabs(v));
    const float scale = absmax > 0 ? absmax / 127 : 1;
    EXPECT_EQ(quantised.scale_O1[row].item<float>(), scale);
    for (size_t i = 0; i < values.size(); ++i) {
      const float q = std::clamp(std::nearbyint(values[i] / scale), -127.0F, 127.0F);
      EXPECT_EQ(quantised.q_OI[row][static_cast<int64_t>(i)].item<float>(), q);
      EXPECT_EQ(back[row][static_cast<int64_t>(i)].item<float>(), q * scale);
      EXPECT_LE(std::fabs(q * scale - values[i]), scale * (row == 4 ? 1.0F : 0.5001F));
    }
  }
  EXPECT_EQ(quantised.q_OI.abs().max().item<int>(), 127);
  EXPECT_TRUE(same_bits(ops::int8_dequantise(quantised, at::kBFloat16), back.to(at::kBFloat16)));
  EXPECT_TRUE(same_bits(ops::int8_dequantise(quantised, at::kDouble), back.to(at::kDouble)));
}

// ---- Formats

StoredWeight stored(const at::Tensor& w) {
  return {"w", [w](const Shard& shard) { return take_shard(w, shard); }, [] { return std::nullopt; }};
}

TEST(Formats, EveryPartIsThePartOfTheWholeWeight) {
  for (const std::string& name : format_names()) {
    for_slices([&](const at::Tensor& w, int64_t dim, int64_t start, int64_t length) {
      const FormatOptions options{name, true, at::kFloat, at::kCPU};
      const Shard shard{static_cast<int>(dim), start, length};
      const auto part = make_frozen_weight(options, stored(w), shard);
      const at::Tensor whole = make_frozen_weight(options, stored(w), {})->dense_OI();
      EXPECT_TRUE(same_bits(part->dense_OI(), whole.narrow(dim, start, length))) << name;
      EXPECT_LT(relative_error(whole, w), name == "none" ? 1e-9 : name == "nf4" ? 0.12 : 1e-2) << name;
    });
  }
}

TEST(Formats, OutlinesHaveTheBytes) {
  for (const std::string& name : format_names()) {
    for_slices([&](const at::Tensor& w, int64_t dim, int64_t start, int64_t length) {
      const Shard shard{static_cast<int>(dim), start, length};
      const at::Tensor outline = w.to(at::kMeta);
      const auto real = make_frozen_weight({name, false, at::kFloat, at::kCPU}, stored(w), shard);
      const auto meta = make_frozen_weight({name, false, at::kFloat, at::kMeta}, stored(outline), shard);
      EXPECT_EQ(meta->bytes(), real->bytes()) << name;
    });
  }
}

TEST(Formats, WeightsThatAreNotFiniteAreRefusedByName) {
  for (const double bad : {std::nan(""), static_cast<double>(INFINITY)}) {
    at::Tensor w = normal({4, 64}, at::kBFloat16);
    w[2][3].fill_(bad);
    for (const char* name : {"nf4", "int8"}) {
      EXPECT_THROW(make_frozen_weight({name, true, at::kFloat, at::kCPU}, stored(w), {}), InputError) << name;
    }
  }
}

// ---- Models

ModelOptions quantised_model(const std::string& path, const std::string& quantization = "nf4",
                             bool double_quant = true) {
  ModelOptions options;
  options.path = path;
  options.dtype = at::kFloat;
  options.quantization = quantization;
  options.double_quant = double_quant;
  return options;
}

std::unique_ptr<Model> load(const ModelOptions& options) {
  Ledger ledger;
  const auto solo = make_solo_communicator(options.device, ledger);
  outline_model(options, *solo);
  return load_model(options, *solo);
}

void expect_same_linears(Model& a, Model& b) {
  const auto left = a.linears(), right = b.linears();
  ASSERT_EQ(left.size(), right.size());
  for (size_t i = 0; i < left.size(); ++i) {
    EXPECT_TRUE(same_bits(left[i]->weight().dense_OI(), right[i]->weight().dense_OI())) << left[i]->name();
  }
}

/// tests/golden/llama as bitsandbytes would have written it.
class Bitsandbytes : public testing::Test {
 protected:
  using Tensors = std::map<std::string, at::Tensor>;

  void SetUp() override {
    WeightFile dense(dense_);
    for (const std::string& name : dense.names()) {
      const at::Tensor w = dense.read(name);
      if (name.ends_with("_proj.weight")) {
        add(name, w);
      } else {
        tensors_[name] = w;
      }
    }
    config_ = json::parse(read_file(dense_ + "/config.json"));
    config_["quantization_config"] = {
        {"quant_method", "bitsandbytes"}, {"load_in_4bit", true}, {"bnb_4bit_quant_type", "nf4"}};
  }

  void add(const std::string& name, const at::Tensor& w, bool double_quant = true) {
    const Nf4 q = ops::nf4_quantise(w, double_quant);
    tensors_[name] = q.codes.unsqueeze(1);
    tensors_[name + ".absmax"] = q.absmax_RB.flatten();
    tensors_[name + ".quant_map"] = at::tensor(kValues);
    json state{{"quant_type", "nf4"}, {"blocksize", 64}, {"dtype", "float32"}, {"shape", w.sizes().vec()}};
    if (double_quant) {
      tensors_[name + ".nested_absmax"] = q.nested_absmax;
      tensors_[name + ".nested_quant_map"] = q.nested_map;
      state.update({{"nested_blocksize", 256}, {"nested_dtype", "float32"}, {"nested_offset", q.nested_offset}});
    }
    write_state(name, state);
  }

  void write_state(const std::string& name, const json& state) {
    const std::string text = state.dump();
    at::Tensor bytes = at::empty({static_cast<int64_t>(text.size())}, at::kByte);
    std::copy(text.begin(), text.end(), bytes.mutable_data_ptr<uint8_t>());
    tensors_[name + ".quant_state.bitsandbytes__nf4"] = bytes;
    states_[name] = state;
  }

  std::string write() {
    DiskStorage().write_file(folder_.path("config.json"), config_.dump());
    DiskStorage().write_file(folder_.path("model.safetensors"), safetensors_image({tensors_.begin(), tensors_.end()}));
    return folder_.path();
  }

  template <class Error>
  void expect_refused(const std::vector<std::string>& words, const std::string& quantization = "nf4") {
    const std::string folder = write();
    try {
      load(quantised_model(folder, quantization));
      ADD_FAILURE() << "accepted, expected: " << words[0];
    } catch (const Error& error) {
      for (const std::string& word : words) {
        EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << error.what();
      }
    }
  }

  const std::string dense_ = golden("llama/model"), up_ = "model.layers.1.mlp.up_proj.weight";
  TemporaryFolder folder_;
  Tensors tensors_;
  std::map<std::string, json> states_;
  json config_;
};

TEST_F(Bitsandbytes, CodesAndStatisticsAreTakenAsTheyAre) {
  expect_same_linears(*load(quantised_model(write())), *load(quantised_model(dense_)));
  // Statistics that quantising again would not find.
  states_[up_]["nested_offset"] = 3.5;
  write_state(up_, states_[up_]);
  const auto changed = load(quantised_model(write())), same = load(quantised_model(dense_));
  for (size_t i = 0; i < same->linears().size(); ++i) {
    const bool equal = at::equal(changed->linears()[i]->weight().dense_OI(), same->linears()[i]->weight().dense_OI());
    EXPECT_EQ(equal, same->linears()[i]->name() + ".weight" != up_) << same->linears()[i]->name();
  }
}

TEST_F(Bitsandbytes, WithoutDoubleQuantisation) {
  WeightFile dense(dense_);
  for (const std::string& name : dense.names()) {
    if (!name.ends_with("_proj.weight")) continue;
    tensors_.erase(name + ".nested_absmax");
    tensors_.erase(name + ".nested_quant_map");
    add(name, dense.read(name), false);
  }
  expect_refused<ConfigError>({"model.double_quant: true", "without", "double_quant: false"});
  expect_same_linears(*load(quantised_model(folder_.path(), "nf4", false)),
                      *load(quantised_model(dense_, "nf4", false)));
}

TEST_F(Bitsandbytes, OtherQuantisationsAreRefusedByName) {
  expect_refused<ConfigError>({"model.quantization: none", "nf4"}, "none");
  expect_refused<ConfigError>({"model.quantization: int8", "nf4"}, "int8");
  config_["quantization_config"]["bnb_4bit_quant_type"] = "fp4";
  expect_refused<InputError>({"config.json", "bitsandbytes", "fp4"});
  config_["quantization_config"] = {{"quant_method", "bitsandbytes"}, {"load_in_8bit", true}};
  expect_refused<InputError>({"config.json", "bitsandbytes"});
  config_["quantization_config"] = {{"quant_method", "gptq"}, {"bits", 4}};
  expect_refused<InputError>({"config.json", "gptq"});
  expect_refused<InputError>({"config.json", "gptq"}, "none");
}

TEST_F(Bitsandbytes, DamagedPartsAreRefusedByName) {
  const Tensors good = tensors_;
  const auto broken = [&](const std::string& part, const at::Tensor& value, const std::string& word) {
    tensors_ = good;
    tensors_[up_ + part] = value;
    expect_refused<InputError>({up_, word});
  };
  broken(".quant_map", at::tensor(kValues) * 2, "quant_map");
  broken(".absmax", at::zeros({3}, at::kByte), "absmax");
  broken("", at::zeros({100, 1}, at::kByte), up_);
  broken(".nested_quant_map", at::zeros({256}, at::kDouble), "nested_quant_map");
  tensors_ = good;
  tensors_.erase(up_ + ".nested_absmax");
  expect_refused<InputError>({up_, "nested_absmax is missing"});
  tensors_ = good;
  tensors_[up_ + ".extra"] = at::zeros({1});
  expect_refused<InputError>({up_ + ".extra"});
}

TEST_F(Bitsandbytes, StatesThatSayOtherwiseAreRefused) {
  for (const json& change : {json{{"blocksize", 128}}, json{{"shape", {64, 64}}}, json{{"quant_type", "fp4"}},
                             json{{"nested_blocksize", 128}}, json{{"nested_offset", "x"}}}) {
    json state = states_[up_];
    state.update(change);
    const json kept = states_[up_];
    write_state(up_, state);
    expect_refused<InputError>({up_, change.begin().key()});
    write_state(up_, kept);
  }
}

TEST_F(Bitsandbytes, ALinearThatIsNotQuantisedIsRefused) {
  std::erase_if(tensors_, [&](const auto& entry) { return entry.first.starts_with(up_); });
  tensors_[up_] = WeightFile(dense_).read(up_);
  expect_refused<InputError>({up_, "not quantised"});
}

// ---- QPiSSA

TEST_F(Bitsandbytes, PissaNeedsTheFullWeight) {
  AdapterConfig config;
  config.method = "pissa";
  const ModelOptions options = quantised_model(write());
  try {
    TrainingRun run(nullptr, 1, options, config);
    ADD_FAILURE() << "accepted";
  } catch (const ConfigError& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("self_attn.q_proj"), std::string::npos) << message;
    EXPECT_NE(message.find("in 4 bits"), std::string::npos) << message;
    EXPECT_NE(message.find("16 bits"), std::string::npos) << message;
  }
}

/// The authors' rounds (methods 8.6), plainly: what W = deq + s B A leaves, relative.
double plain_qpissa_error(const at::Tensor& w, int64_t rank, int64_t rounds) {
  at::Tensor target = w.to(at::kDouble), dequantised, low_rank;
  for (int64_t round = 0; round < rounds; ++round) {
    const auto [u, s, vt] = at::linalg_svd(target, /*full_matrices=*/false);
    low_rank = at::mm(u.narrow(1, 0, rank) * s.narrow(0, 0, rank), vt.narrow(0, 0, rank));
    dequantised =
        ops::nf4_dequantise(ops::nf4_quantise((w.to(at::kDouble) - low_rank).to(at::kFloat), true), at::kFloat);
    target = w.to(at::kDouble) - dequantised.to(at::kDouble);
  }
  return relative_error(dequantised.to(at::kDouble) + low_rank, w);
}

TEST(QPissa, RoundsAreThoseOfThePlainFormAndLowerTheError) {
  AdapterConfig config;
  config.method = "pissa";
  config.lora_alpha = 4;  // s = 1/2: the factors carry its inverse
  WeightFile file(golden("llama/model"));
  std::map<std::string, double> before;
  for (const int64_t rounds : {1, 2, 3, 5}) {
    config.options.edit<PissaConfig>().iterations = rounds;
    TrainingRun run(nullptr, 1, quantised_model(golden("llama/model")), config);
    for (const AdaptedLinear* linear : run.model->linears()) {
      const at::Tensor w = file.read(linear->name() + ".weight");
      const auto factor = [&](const char* suffix) {
        return run.store.at("base_model.model." + linear->name() + suffix).master;
      };
      const at::Tensor product = at::mm(factor(".lora_B.weight"), factor(".lora_A.weight")) * 0.5;
      const double error = relative_error(linear->weight().dense_OI() + product, w);
      EXPECT_NEAR(error / plain_qpissa_error(w, 8, rounds), 1, 1e-3) << linear->name() << " " << rounds;
      const double last = rounds == 1 ? 1 : before[linear->name()];
      EXPECT_LT(error, last) << linear->name() << " " << rounds;
      before[linear->name()] = error;
    }
  }
}

TEST(Rebuild, ChangesTheFullWeightBeforeItIsQuantised) {
  const ModelOptions options = quantised_model(golden("llama/model"));
  const auto plain = load(options), changed = load(options);
  AdaptedLinear& doubled = *changed->linears()[5];
  const at::Tensor before = plain->linears()[5]->weight().dense_OI().clone();
  doubled.rebuild([](const at::Tensor& w) { return w * 2; });
  EXPECT_TRUE(same_bits(doubled.weight().dense_OI(), before * 2));
  doubled.rebuild();
  EXPECT_TRUE(same_bits(doubled.weight().dense_OI(), before));
}

}  // namespace
}  // namespace corank::test
