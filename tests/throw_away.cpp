#include <fmt/format.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <set>

#include "data/json_object.h"
#include "trainer/methods/attach.h"
#include "trainer/methods/config_keys.h"
#include "trainer/methods/lora_factors.h"
#include "trainer/methods/merge_config.h"
#include "trainer/methods/methods.h"
#include "trainer/weights/formats.h"

// A method and a format of no use, whole, each with its line in the table at the end: whatever a test is linked with
// this file goes through the tables, it finds them by itself.
namespace corank::test {
namespace {

struct GainConfig {
  double gain = 3;
};

const GainConfig& gain_config(const AdapterConfig& config) { return config.options.get<GainConfig>(); }

/// W + g B A: LoRA whose scaling is a key of its own.
class GainMethod : public AdapterMethod {
 public:
  using AdapterMethod::AdapterMethod;

  void attach(Model& model, ParameterStore& store, uint64_t seed) override {
    attach_adapters(model, config_, [&](const AdaptedLinear& linear) {
      auto adapter = std::make_unique<LoraAdapter>(config_.lora_dropout);
      LoraFactors::Options options = lora_options(config_, linear.site(), seed);
      options.scale = gain_config(config_).gain;
      adapter->factors.add_to(store, linear.site(), options);
      return adapter;
    });
  }
  GradientSizes gradient_sizes(const LinearSize& linear, int tensor) const override {
    return lora_gradient_sizes(linear, config_.rank_of(linear.name), tensor);
  }
  UpdateCost update_cost(const LinearSize& linear, int) const override {
    return lora_update_cost(config_.rank_of(linear.name));
  }
  at::Tensor merged(const std::string&, const ModuleTensors& tensors, const at::Tensor& w_OI) const override {
    return w_OI + at::mm(tensors.at(".lora_B.weight"), tensors.at(".lora_A.weight")) * gain_config(config_).gain;
  }
};

class GainEntry : public MethodEntry {
 public:
  std::string name() const override { return "gain"; }
  std::unique_ptr<AdapterMethod> make(const AdapterConfig& config) const override {
    return std::make_unique<GainMethod>(config);
  }

  std::vector<std::string> common_keys() const override { return keys_of_adapters({"r", "rank_pattern"}); }
  std::vector<OwnKey> keys() const override {
    return {{"gain", [](const AdapterConfig& c) { return fmt::format("{}", gain_config(c).gain); }}};
  }
  void read(const Section& section, AdapterConfig& config) const override {
    GainConfig& c = config.options.edit<GainConfig>();
    c.gain = section.get<double>("gain", c.gain);
  }
  void check(const AdapterConfig& config, const Require& require) const override {
    require.scale("gain", gain_config(config).gain);
  }

  std::string peft_switch() const override { return "use_gain"; }
  std::vector<OwnField> fields() const override { return {{"gain"}}; }
  void read_fields(const JsonObject& file, AdapterConfig& config) const override {
    GainConfig& c = config.options.edit<GainConfig>();
    c.gain = file.get("gain", c.gain);
  }
  void write_fields(const AdapterConfig& config, nlohmann::json& fields) const override {
    fields.update({{peft_switch(), true}, {"gain", gain_config(config).gain}});
  }
  void merge(const RunBesideFile& both, AdapterConfig& /*merged*/) const override {
    both.require_same("gain", gain_config(both.run).gain, gain_config(both.file).gain);
  }
};

const MethodEntry& gain_method() {
  static const GainEntry entry;
  return entry;
}

/// What bfloat16 keeps of a weight, held in the compute dtype.
std::unique_ptr<FrozenWeight> make_cut_weight(const FormatOptions& options, const StoredWeight& stored,
                                              const Shard& shard, const WeightPlace& place) {
  StoredWeight cut = stored;
  cut.read = [read = stored.read](const Shard& part) {
    const at::Tensor w = read(part);
    return w.to(at::kBFloat16).to(w.scalar_type());
  };
  return make_dense_weight(options, cut, shard, place);
}

const ScopedMethod kMethod(gain_method());
const ScopedFormat kFormat({"cut", make_cut_weight, /*shares_rooms=*/true});

TEST(ThrowAway, TheSuitesFindAMethodAndAFormatByThemselves) {
  std::set<std::string> params;
  const testing::UnitTest& all = *testing::UnitTest::GetInstance();
  for (int i = 0; i < all.total_test_suite_count(); ++i) {
    const testing::TestSuite& suite = *all.GetTestSuite(i);
    for (int j = 0; j < suite.total_test_count(); ++j) {
      const std::string name = suite.GetTestInfo(j)->name();
      params.insert(std::string(suite.name()) + "/" + name.substr(name.find('/') + 1));
    }
  }
  for (const char* name : {"Conformance/Linears/gain_column", "Conformance/Linears/gain_cut_row",
                           "Conformance/Runs/gain", "Conformance/Runs/gain_cut", "Conformance/Runs/dora_cut"}) {
    EXPECT_TRUE(params.contains(name)) << name;
  }
}

TEST(ThrowAway, TheRunFileHasTheMethodsKey) {
  const auto read = [](const std::string& text) { return read_adapter_config(Section::parse(text, "run.yaml")); };
  const auto refused = [&](const std::string& text, const std::string& words) {
    try {
      read(text);
      ADD_FAILURE() << "taken: " << text;
    } catch (const ConfigError& error) {
      EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
    }
  };
  const AdapterConfig config = read("method: gain\ngain: 2.5\n");
  std::string value;
  for (const AdapterKey& key : adapter_keys()) {
    if (key.name == "gain") value = key.yaml(config);
  }
  EXPECT_EQ(value, "2.5");
  refused("method: gain\ngain: 0\n", "gain: 0 is not above 0");
  refused("method: dora\ngain: 2\n", "gain: belongs to method gain, this run's method is dora");
  refused("method: gain\nuse_rslora: true\n",
          "use_rslora: belongs to method lora, dora, pissa, this run's method is gain");
}

}  // namespace
}  // namespace corank::test
