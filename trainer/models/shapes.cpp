#include <fmt/format.h>

#include "configs/error.h"
#include "data/file.h"
#include "trainer/models/families.h"

namespace corank {
namespace {

struct Shape {
  const char* name;
  const char* config_json;
};

// Sizes of the published configurations; random weights of these shapes are for benchmarks. tiny, small and medium are
// ours, for bytes as tokens: tests and launch/experiments train them from random weights.
constexpr Shape kShapes[] = {
    {"tiny-llama", R"({"model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 176,
      "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-5})"},
    {"small-llama", R"({"model_type": "llama", "vocab_size": 256, "hidden_size": 128, "intermediate_size": 336,
      "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5})"},
    {"medium-llama", R"({"model_type": "llama", "vocab_size": 256, "hidden_size": 512, "intermediate_size": 1376,
      "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "rms_norm_eps": 1e-5})"},
    {"tiny-gpt2", R"({"model_type": "gpt2", "vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 8,
      "n_positions": 64})"},
    {"smollm2-135m", R"({"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
      "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
      "rope_theta": 100000, "tie_word_embeddings": true})"},
    {"llama-3.2-1b", R"({"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
      "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
      "rms_norm_eps": 1e-5, "rope_theta": 500000, "tie_word_embeddings": true})"},
    {"llama-3-8b", R"({"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
      "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
      "rope_theta": 500000})"},
    {"llama-3-70b", R"({"model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
      "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
      "rope_theta": 500000})"},
    {"qwen2.5-7b", R"({"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
      "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
      "rope_theta": 1000000})"},
    {"qwen3-8b", R"({"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
      "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
      "rms_norm_eps": 1e-6, "rope_theta": 1000000})"},
    {"mistral-7b", R"({"model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
      "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
      "rope_theta": 10000, "sliding_window": 4096})"},
    {"gpt3-175b", R"({"model_type": "gpt2", "vocab_size": 50257, "n_embd": 12288, "n_layer": 96, "n_head": 96,
      "n_positions": 2048, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0})"},
    {"gpt2", R"({"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12,
      "n_positions": 1024, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1})"},
};

}  // namespace

std::vector<std::string> shape_names() {
  std::vector<std::string> names;
  for (const Shape& shape : kShapes) names.emplace_back(shape.name);
  return names;
}

std::string model_config_json(const ModelOptions& options) {
  if (!options.path.empty()) return read_file(options.path + "/config.json", int64_t{1} << 24);
  for (const Shape& shape : kShapes) {
    if (options.shape == shape.name) return shape.config_json;
  }
  throw ConfigError(fmt::format("model.shape: '{}' is not one of {}", options.shape, fmt::join(shape_names(), ", ")));
}

}  // namespace corank
