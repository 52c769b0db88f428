#include <nlohmann/json.hpp>

#include "tests/support.h"

// Attributes of config.json that change the result: honoured, or refused by name.
namespace corank::test {
namespace {

using nlohmann::json;

/// What is said about a named shape with `patch` on top of its config.json; empty if it is accepted.
std::string complaint(const std::string& shape, const json& patch, int tensor = 1) {
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

struct Refusal {
  std::string shape;
  json patch;
  std::string word;  ///< in the message
};

TEST(ModelConfig, WhatChangesTheResultIsRefusedByName) {
  const std::vector<Refusal> refusals{
      {"tiny-llama", {{"sliding_window", 16}}, "sliding_window"},
      {"tiny-llama", {{"hidden_act", "gelu"}}, "hidden_act"},
      {"tiny-llama", {{"attention_dropout", 1.0}}, "attention_dropout"},
      {"tiny-llama", {{"partial_rotary_factor", 0.5}}, "partial_rotary_factor"},
      {"tiny-llama", {{"rope_parameters", {{"rope_type", "yarn"}}}}, "yarn"},
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
  for (const Refusal& r : refusals) {
    const std::string message = complaint(r.shape, r.patch);
    EXPECT_NE(message.find(r.word), std::string::npos) << r.shape << ' ' << r.patch << ": '" << message << "'";
  }
}

TEST(ModelConfig, EveryShapeIsAccepted) {
  for (const std::string& shape : shape_names()) EXPECT_EQ(complaint(shape, json::object()), "") << shape;
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
