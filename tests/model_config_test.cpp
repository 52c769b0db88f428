#include <fmt/format.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "data/file.h"
#include "data/storage.h"
#include "data/weight_file.h"
#include "tests/golden_case.h"
#include "trainer/run/generation.h"

// Attributes of config.json that change the result: honoured, or refused by name.
namespace corank::test {
namespace {

using nlohmann::json;

/// What is said about a named shape with `patch` on top of its config.json; empty if it is accepted.
std::string config_complaint(const std::string& shape, const json& patch, int tensor = 1) {
  ModelOptions options;
  options.shape = shape;
  json config = json::parse(model_config_json(options));
  config.update(patch);
  try {
    check_model_config(config.dump(), "config.json", tensor);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

struct ConfigRefusal {
  std::string shape;
  json patch;
  std::string word;  ///< in the message
};

TEST(ModelConfig, WhatChangesTheResultIsRefusedByName) {
  const std::vector<ConfigRefusal> refusals{
      {"tiny-llama", {{"hidden_act", "gelu"}}, "hidden_act"},
      {"tiny-llama", {{"attention_dropout", 1.0}}, "attention_dropout"},
      {"tiny-llama", {{"partial_rotary_factor", 0.5}}, "partial_rotary_factor"},
      {"tiny-llama", {{"rope_parameters", {{"rope_type", "yarn"}}}}, "factor is missing"},
      {"tiny-llama", {{"rope_parameters", {{"rope_type", "llama3"}, {"factor", 8}}}}, "low_freq_factor is missing"},
      {"tiny-llama", {{"rope_parameters", {{"full_attention", json::object()}}}}, "full_attention"},
      {"tiny-llama", {{"rope_scaling", {{"type", "default"}, {"mrope_section", {1, 1}}}}}, "mrope_section"},
      {"tiny-llama", {{"rope_scaling", {{"type", "yarn"}, {"factor", 4}, {"attn_factor", 2}}}}, "attn_factor"},
      {"tiny-llama", {{"rope_scaling", json::array()}}, "rope_scaling is []"},
      {"tiny-llama", {{"rope_scaling", {{"type", "linear"}, {"factor", -1}}}}, "factor is -1"},
      {"tiny-llama", {{"rope_scaling", {{"type", "linear"}, {"factor", 1e-320}}}}, "rotary frequencies"},
      {"tiny-llama", {{"rope_scaling", {{"type", "yarn"}, {"factor", 4}, {"beta_fast", -1}}}}, "beta_fast"},
      {"tiny-llama", {{"rope_theta", 0}}, "rope_theta"},
      {"tiny-llama", {{"rms_norm_eps", -1e-6}}, "rms_norm_eps"},
      {"tiny-llama", {{"hidden_size", int64_t{1} << 62}}, "hidden_size"},
      {"tiny-llama", {{"num_hidden_layers", 100'000'000}}, "num_hidden_layers"},
      {"tiny-llama", {{"num_attention_heads", 8.0}}, "num_attention_heads"},
      {"tiny-llama", {{"tie_word_embeddings", nullptr}}, "tie_word_embeddings"},
      {"tiny-llama", {{"architectures", {"LlamaForSequenceClassification"}}}, "LlamaForSequenceClassification"},
      {"tiny-llama", {{"is_causal", false}}, "is_causal"},
      {"tiny-llama", {{"mystery", 3}}, "mystery is 3"},
      {"tiny-llama", {{"layer_types", {"sliding_attention", "full_attention"}}}, "sliding_window"},
      {"tiny-llama", {{"model_type", nullptr}}, "model_type"},
      {"tiny-llama", {{"quantization_config", {{"load_in_4bit", 1}}}}, "load_in_4bit is 1"},
      {"tiny-llama", {{"quantization_config", {{"quant_method", "gptq"}}}}, "gptq"},
      {"gpt2", {{"layer_norm_epsilon", -1e-5}}, "layer_norm_epsilon"},
      {"gpt2", {{"rope_theta", 500.0}}, "rope_theta"},
      {"tiny-llama", {{"num_key_value_heads", 3}}, "num_key_value_heads"},
      {"tiny-llama", {{"hidden_size", 0}}, "hidden_size"},
      {"tiny-llama", {{"model_type", "mamba"}}, "mamba"},
      {"qwen2.5-7b", {{"layer_types", {"full_attention"}}}, "layer_types"},
      {"qwen2.5-7b", {{"use_sliding_window", true}, {"sliding_window", 0}}, "sliding_window"},
      {"qwen2.5-7b", {{"layer_types", std::vector<std::string>(28, "sliding_attention")}}, "use_sliding_window"},
      {"qwen3-8b", {{"layer_types", std::vector<std::string>(36, "chunked_attention")}}, "chunked_attention"},
      {"mistral-7b", {{"rope_scaling", {{"rope_type", "longrope"}}}}, "longrope"},
      {"mistral-7b", {{"sliding_window", -1}}, "sliding_window"},
      {"tiny-llama", {{"model_type", "phi3"}, {"partial_rotary_factor", 0.5}}, "partial_rotary_factor"},
      {"tiny-llama", {{"model_type", "phi3"}, {"rope_scaling", {{"type", "longrope"}}}}, "longrope"},
      {"gpt2", {{"activation_function", "relu"}}, "activation_function"},
      {"gpt2", {{"scale_attn_weights", false}}, "scale_attn_weights"},
      {"gpt2", {{"scale_attn_by_inverse_layer_idx", true}}, "scale_attn_by_inverse_layer_idx"},
      {"gpt2", {{"add_cross_attention", true}}, "add_cross_attention"},
      {"gpt2", {{"quantization_config", json::object()}}, "quantization_config"},
      {"gpt2", {{"n_head", 7}}, "n_head"},
  };
  for (const ConfigRefusal& r : refusals) {
    const std::string message = config_complaint(r.shape, r.patch);
    EXPECT_NE(message.find(r.word), std::string::npos) << r.shape << ' ' << r.patch << ": '" << message << "'";
  }
}

TEST(ModelConfig, EveryShapeIsAccepted) {
  for (const std::string& shape : shape_names()) EXPECT_EQ(config_complaint(shape, json::object()), "") << shape;
}

/// What published models and their fine-tunes carry beyond what is read.
TEST(ModelConfig, WhatTransformersIgnoresIsIgnoredByName) {
  const std::vector<std::pair<std::string, json>> notes{
      {"tiny-llama", json::parse(R"({"_name_or_path": "x", "_flash_attn_2_enabled": true, "pretraining_tp": 2,
         "rope_interleaved": true, "is_llama_config": true, "unsloth_fixed": true, "transformers.js_config": {},
         "auto_map": {}, "torch_dtype": "float16", "use_cache": false, "eos_token_id": [1, 2], "temperature": 0.6,
         "max_length": 4096, "rope_scaling": null, "hidden_act": "swish", "head_dim": null, "sliding_window": 16})")},
      {"qwen2.5-7b", json::parse(R"({"use_mrope": false, "use_sliding_window": false, "max_window_layers": 28,
         "sliding_window": 131072, "attention_bias": true})")},
      {"mistral-7b", json::parse(R"({"attention_bias": false, "sliding_window": null, "pad_token_id": 2})")},
      {"gpt2", json::parse(R"({"n_special": 0, "predict_special_tokens": true, "output_past": true, "n_ctx": 1024,
         "n_inner": null, "summary_type": "cls_index", "summary_use_proj": true, "summary_activation": null,
         "summary_proj_to_labels": true, "summary_first_dropout": 0.1,
         "reorder_and_upcast_attn": false, "task_specific_params": {"text-generation": {"max_length": 50}}})")},
  };
  for (const auto& [shape, patch] : notes) EXPECT_EQ(config_complaint(shape, patch), "") << shape;
}

// Values that no field may carry silently, as JSON texts.
std::vector<std::string> hostile_values() {
  const auto nested = [](size_t levels) { return std::string(levels, '[') + std::string(levels, ']'); };
  return {"null",
          "true",
          "\"x\"",
          "\"\"",
          "[]",
          "[1]",
          "{}",
          "{\"a\": 1}",
          "-1",
          "0",
          "-0.5",
          "1.5",
          "16.0",
          "1e308",
          "1e400",
          "4611686018427387904",
          "1180591620717411303424",
          "-9223372036854775808",
          nested(40),
          nested(100'000),
          "\"" + std::string(5000, 'y') + "\"",
          "NaN",
          "1, \"model_type\": \"llama\""};
}

/// Every key of `object` in turn with every hostile value; `place` puts the text of the object into config.json.
template <class Place>
int64_t try_hostile_values(const json& object, const std::vector<std::string>& more_keys, const Place& place) {
  std::vector<std::string> keys = more_keys;
  for (const auto& item : object.items()) keys.push_back(item.key());
  int64_t tried = 0;
  for (const std::string& key : keys) {
    json rest = object;
    rest.erase(key);
    const std::string tail = rest.empty() ? "}" : "," + rest.dump().substr(1);
    for (const std::string& value : hostile_values()) {
      const std::string text = place("{\"" + key + "\":" + value + tail);
      try {
        check_model_config(text, "config.json", 1);
      } catch (const Error& error) {
        EXPECT_TRUE(error.code() == ExitCode::data || error.code() == ExitCode::usage) << key << ' ' << error.what();
        EXPECT_LT(std::string(error.what()).size(), 1000u) << key;
      }
      ++tried;
    }
  }
  return tried;
}

TEST(ModelConfig, HostileValuesOfEveryFieldAreRefusedOrTaken) {
  const std::vector<std::string> more{"rope_scaling",
                                      "rope_parameters",
                                      "rope_theta",
                                      "quantization_config",
                                      "sliding_window",
                                      "layer_types",
                                      "is_causal",
                                      "max_window_layers",
                                      "partial_rotary_factor",
                                      "head_dim",
                                      "hidden_size",
                                      "num_attention_heads",
                                      "original_max_position_embeddings"};
  for (const std::string& model : family_cases()) {
    SCOPED_TRACE(model);
    json config = json::parse(read_file(golden(model + "/model/config.json")));
    if (config.contains("use_sliding_window")) config["use_sliding_window"] = true;
    EXPECT_GT(try_hostile_values(config, more, [](const std::string& text) { return text; }), 500);
  }
  const json config = json::parse(read_file(golden("llama/model/config.json")));
  const auto inside = [&](const char* key) {
    return [&config, key](const std::string& text) {
      json rest = config;
      rest.erase("rope_parameters");
      return std::string("{\"") + key + "\":" + text + "," + rest.dump().substr(1);
    };
  };
  const std::vector<json> ropes{
      {{"rope_type", "linear"}, {"factor", 4.0}},
      {{"rope_type", "dynamic"}, {"factor", 4.0}},
      {{"rope_type", "llama3"}, {"factor", 8.0}, {"low_freq_factor", 1.0}, {"high_freq_factor", 4.0}},
      {{"rope_type", "yarn"},
       {"factor", 4.0},
       {"attention_factor", 1.0},
       {"mscale", 1.0},
       {"mscale_all_dim", 1.0},
       {"beta_fast", 32},
       {"beta_slow", 1},
       {"truncate", true}},
  };
  for (const json& rope : ropes) {
    try_hostile_values(rope, {"rope_theta", "type", "original_max_position_embeddings"}, inside("rope_scaling"));
  }
  try_hostile_values({{"quant_method", "bitsandbytes"},
                      {"load_in_4bit", true},
                      {"bnb_4bit_quant_type", "nf4"},
                      {"bnb_4bit_use_double_quant", true}},
                     {"load_in_8bit"}, inside("quantization_config"));
}

/// The model of a golden case with another config.json.
class ChangedModel {
 public:
  ChangedModel(const std::string& model, const json& change) {
    json config = json::parse(read_file(golden(model + "/model/config.json")));
    config.update(change);
    for (const auto& key : config.value("absent", json::array())) config.erase(key.get<std::string>());
    config.erase("absent");
    DiskStorage().write_file(folder_.path("config.json"), config.dump());
    std::filesystem::create_symlink(golden(model + "/model/model.safetensors"), folder_.path("model.safetensors"));
    options_.path = folder_.path();
    options_.dtype = at::kFloat;
    options_.max_positions = 64;
  }

  std::unique_ptr<Model> load(int64_t max_positions = 64) {
    options_.max_positions = max_positions;
    return load_model(options_, *solo_);
  }
  std::unique_ptr<Model> outline() { return outline_model(options_, *solo_); }
  at::Tensor logits(const std::vector<int64_t>& tokens) { return all_logits(*load(), tokens, *solo_); }

 private:
  TemporaryFolder folder_;
  ModelOptions options_;
  Ledger ledger_;
  std::unique_ptr<Communicator> solo_ = make_solo_communicator(at::kCPU, ledger_);
};

/// As in make_variants.py: of the longest sample.
double loss_of(ChangedModel& changed, const std::string& model) {
  std::vector<int64_t> tokens;
  const json batch = json::parse(read_file(golden(model + "/batch.json")));
  for (const json& sample : batch["samples"]) {
    const auto candidate = sample["tokens"].get<std::vector<int64_t>>();
    if (candidate.size() > tokens.size()) tokens = candidate;
  }
  const auto count = static_cast<int64_t>(tokens.size());
  const at::Tensor targets = at::tensor(tokens, at::kLong).narrow(0, 1, count - 1);
  return at::cross_entropy_loss(changed.logits(tokens).narrow(0, 0, count - 1), targets).item<double>();
}

/// tests/golden/make_variants.py: transformers' own value, or that it refuses.
TEST(ModelConfig, VariantsAreWhatTransformersMakesOfThem) {
  int64_t accepted = 0, refused = 0;
  for (const json& row : json::parse(read_file(golden("config_variants.json")))) {
    const auto model = row["model"].get<std::string>();
    SCOPED_TRACE(model + " " + row["change"].dump());
    ChangedModel changed(model, row["change"]);
    if (row["loss"].is_null()) {
      EXPECT_THROW(changed.load(), InputError);
      ++refused;
    } else {
      EXPECT_NEAR(loss_of(changed, model), row["loss"].get<double>(), 2e-6);
      ++accepted;
    }
  }
  EXPECT_GT(accepted, 150);
  EXPECT_GT(refused, 100);
}

TEST(ModelConfig, DynamicScalingEndsAtMaxPositionEmbeddings) {
  ChangedModel changed("llama", {{"rope_scaling", {{"type", "dynamic"}, {"factor", 4.0}}}});
  EXPECT_EQ(changed.load(64)->num_layers(), 2);
  EXPECT_THROW(changed.load(65), InputError);
}

/// Files that hold a head of their own are believed; one that is the embedding again is tied.
TEST(ModelConfig, AHeadThatIsNotTheEmbeddingStaysItsOwn) {
  const json tied{{"tie_word_embeddings", true}};
  ChangedModel other("llama", tied);
  EXPECT_TRUE(other.load()->head().weight_VD.value.defined());
  for (const auto& model : {other.load(), other.outline()}) {
    EXPECT_EQ(model->other_weights().back().name, "lm_head.weight");
    EXPECT_TRUE(model->other_weights().front().saveable);
  }
  const TemporaryFolder folder;
  WeightFile weights(golden("llama/model"));
  NamedTensors tensors;
  for (const std::string& name : weights.names()) {
    tensors.emplace_back(name, weights.read(name == "lm_head.weight" ? "model.embed_tokens.weight" : name));
  }
  DiskStorage().write_file(folder.path("model.safetensors"), safetensors_image(tensors));
  json config = json::parse(read_file(golden("llama/model/config.json")));
  config.update(tied);
  DiskStorage().write_file(folder.path("config.json"), config.dump());
  Ledger ledger;
  const auto solo = make_solo_communicator(at::kCPU, ledger);
  ModelOptions options;
  options.path = folder.path();
  for (const auto& model : {load_model(options, *solo), outline_model(options, *solo)}) {
    EXPECT_EQ(model->other_weights().back().name, "model.norm.weight");
  }
}

/// The llama case with one tensor replaced.
class BaseWeights : public testing::Test {
 protected:
  void write(const std::string& replaced, const at::Tensor& by) {
    WeightFile weights(golden("llama/model"));
    NamedTensors tensors;
    for (const std::string& name : weights.names()) {
      tensors.emplace_back(name, name == replaced ? by : weights.read(name));
    }
    DiskStorage().write_file(folder_.path("model.safetensors"), safetensors_image(tensors));
    DiskStorage().write_file(folder_.path("config.json"), read_file(golden("llama/model/config.json")));
    options_.path = folder_.path();
    options_.dtype = at::kFloat;
  }
  at::Tensor original(const std::string& name) { return WeightFile(golden("llama/model")).read(name); }

  /// What is said of the model, which has to name tensor and file.
  void expect_refused(const std::string& tensor, bool outline) {
    try {
      outline ? outline_model(options_, *solo_) : load_model(options_, *solo_);
      ADD_FAILURE() << tensor << " was accepted";
    } catch (const InputError& error) {
      EXPECT_NE(std::string(error.what()).find("model.safetensors: tensor " + tensor), std::string::npos)
          << error.what();
    }
  }

  TemporaryFolder folder_;
  ModelOptions options_;
  Ledger ledger_;
  std::unique_ptr<Communicator> solo_ = make_solo_communicator(at::kCPU, ledger_);
};

const char* const kSomeTensors[] = {"model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight",
                                    "model.layers.0.input_layernorm.weight", "lm_head.weight"};

TEST_F(BaseWeights, WhatIsNotFiniteIsNamed) {
  for (const char* name : kSomeTensors) {
    for (const double value : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
      for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
        at::Tensor weight = original(name).to(dtype);
        weight.view({-1})[-1] = value;
        write(name, weight);
        expect_refused(name, /*outline=*/false);
      }
    }
  }
}

TEST_F(BaseWeights, IntegersAreRefusedFromTheHeadersAlone) {
  for (const char* name : kSomeTensors) {
    for (const at::ScalarType dtype : {at::kLong, at::kInt, at::kChar, at::kByte, at::kBool}) {
      write(name, original(name).to(dtype));
      expect_refused(name, /*outline=*/true);
      expect_refused(name, /*outline=*/false);
    }
  }
  write("lm_head.weight", original("lm_head.weight").to(at::kDouble));
  EXPECT_EQ(load_model(options_, *solo_)->num_layers(), 2);
}

TEST(ModelConfig, SequencesBeyondTheLearnedPositionsAreRefused) {
  Ledger ledger;
  const auto solo = make_solo_communicator(at::kCPU, ledger);
  ModelOptions options;
  options.shape = "tiny-gpt2";
  options.max_positions = 64;
  EXPECT_EQ(outline_model(options, *solo)->num_layers(), 2);
  options.max_positions = 65;
  EXPECT_THROW(outline_model(options, *solo), ConfigError);
  options.shape = "tiny-llama";
  EXPECT_EQ(outline_model(options, *solo)->num_layers(), 2);
}

}  // namespace
}  // namespace corank::test
