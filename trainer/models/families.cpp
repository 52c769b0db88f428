#include "trainer/models/families.h"

#include <algorithm>

#include "comm/backends.h"
#include "data/file.h"
#include "trainer/models/config_file.h"
#include "trainer/models/decoder.h"
#include "trainer/models/quantization_config.h"

namespace corank {
namespace {

struct Family {
  const char* model_type;
  DecoderConfig (*read)(const ConfigFile& file);
  DecoderNames (*names)();
};

constexpr Family kFamilies[] = {
    {"llama", llama_config, llama_names}, {"qwen2", qwen2_config, llama_names},
    {"qwen3", qwen3_config, qwen3_names}, {"mistral", mistral_config, llama_names},
    {"phi3", phi3_config, phi3_names},    {"gpt2", gpt2_config, gpt2_names},
};

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
    {"gpt2", R"({"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12,
      "n_positions": 1024, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1})"},
};

const Family& family_of(const ConfigFile& file) {
  const auto type = file.get<std::string>("model_type");
  std::vector<std::string> known;
  for (const Family& family : kFamilies) {
    if (type == family.model_type) return family;
    known.emplace_back(family.model_type);
  }
  file.fail(fmt::format("model_type {} is not one of {}. Only these architectures can be trained", shown(type),
                        fmt::join(known, ", ")));
}

/// What is not a causal language model: another head (LlamaForSequenceClassification), another attention.
void refuse_other_tasks(const ConfigFile& file) {
  const auto architectures = file.get_optional<std::vector<std::string>>("architectures");
  for (const std::string& name : architectures.value_or(std::vector<std::string>())) {
    if (name.find("For") == std::string::npos || name.ends_with("ForCausalLM")) continue;
    file.fail("architectures names " + shown_key(name) + ", which is no causal language model");
  }
  if (!file.get<bool>("is_causal", true)) file.refuse("is_causal is false");
}

DecoderConfig read_config(const std::string& config_json, const std::string& origin) {
  const ConfigFile file(config_json, origin);
  const Family& family = family_of(file);
  DecoderConfig config = family.read(file);
  config.names = family.names();
  refuse_other_tasks(file);
  ignore_bookkeeping(file);
  file.done();
  return config;
}

/// A folder of the model without its head ("gpt2" itself is one): its names lack the model's own prefix.
class BareWeights : public WeightSource {
 public:
  BareWeights(std::unique_ptr<WeightSource> weights, std::string prefix)
      : weights_(std::move(weights)), prefix_(std::move(prefix)) {}
  at::Tensor read(const std::string& name, const std::vector<int64_t>& shape, const Shard& shard) override {
    return weights_->read(bare(name), shape, shard);
  }
  std::optional<ops::Nf4> read_nf4(const std::string& name, const std::vector<int64_t>& shape) override {
    return weights_->read_nf4(bare(name), shape);
  }
  bool differ(const std::string& a, const std::string& b) override { return weights_->differ(bare(a), bare(b)); }
  void skip(const std::string& name) override { weights_->skip(bare(name)); }
  void finish() override { weights_->finish(); }

 private:
  std::string bare(const std::string& name) const {
    return name.starts_with(prefix_) ? name.substr(prefix_.size()) : name;
  }
  std::unique_ptr<WeightSource> weights_;
  std::string prefix_;
};

std::unique_ptr<WeightSource> weights_of(const ModelOptions& options, const DecoderNames& names) {
  const bool outline = options.device.is_meta();
  if (options.path.empty()) return random_weights(options.seed, outline);
  auto weights = folder_weights(options.path, outline);
  const std::string prefix = names.embedding.substr(0, names.embedding.find('.') + 1);
  if (!WeightFile(options.path).has(names.embedding.substr(prefix.size()) + ".weight")) return weights;
  return std::make_unique<BareWeights>(std::move(weights), prefix);
}

void add_once(std::vector<std::string>& list, const std::string& name) {
  if (std::count(list.begin(), list.end(), name) == 0) list.push_back(name);
}

std::string origin_of(const ModelOptions& options) {
  return options.path.empty() ? "model.shape " + options.shape : options.path + "/config.json";
}

/// Weights that are stored quantised stay as they are.
void check_stored_format(const std::string& config_json, const ModelOptions& options) {
  if (!stored_as_nf4(config_json, origin_of(options))) return;
  const std::string found = origin_of(options) + " says that the weights are bitsandbytes' nf4";
  if (options.quantization != "nf4") {
    throw ConfigError(
        fmt::format("model.quantization: {}, but {}. Write model.quantization: nf4.", options.quantization, found));
  }
}

}  // namespace

std::vector<std::string> shape_names() {
  std::vector<std::string> names;
  for (const Shape& shape : kShapes) names.emplace_back(shape.name);
  return names;
}

FamilyModules family_modules() {
  FamilyModules modules;
  for (const Family& family : kFamilies) {
    const DecoderNames names = family.names();
    add_once(modules.embeddings, names.embedding.substr(names.embedding.rfind('.') + 1));
    add_once(modules.heads, names.head.substr(names.head.rfind('.') + 1));
    for (const std::string& name : {names.head, names.embedding, names.positions, names.final_norm}) {
      if (!name.empty()) add_once(modules.others, name);
    }
    for (const std::string& name : {names.attention_norm, names.feed_forward_norm, names.q_norm, names.k_norm}) {
      if (!name.empty()) add_once(modules.others, names.layers + ".0." + name);
    }
  }
  return modules;
}

std::string model_config_json(const ModelOptions& options) {
  if (!options.path.empty()) return read_file(options.path + "/config.json", int64_t{1} << 24);
  for (const Shape& shape : kShapes) {
    if (options.shape == shape.name) return shape.config_json;
  }
  throw ConfigError(fmt::format("model.shape: '{}' is not one of {}", options.shape, fmt::join(shape_names(), ", ")));
}

void check_model_config(const std::string& config_json, const std::string& origin, int tensor) {
  check_split(read_config(config_json, origin), tensor);
  stored_as_nf4(config_json, origin);  // or refuses
}

std::unique_ptr<Model> load_model(const ModelOptions& options, Communicator& tp) {
  const std::string config_json = model_config_json(options);
  DecoderConfig config = read_config(config_json, origin_of(options));
  check_split(config, tp.size());
  check_stored_format(config_json, options);
  check_positions(config, origin_of(options), options.max_positions);
  const std::shared_ptr<WeightSource> weights = weights_of(options, config.names);
  // Files that hold another head are believed more than tie_word_embeddings, as in transformers.
  if (weights->differ(config.names.embedding + ".weight", config.names.head + ".weight")) config.tied_head = false;
  auto model = make_decoder(config, options, weights, tp);
  weights->finish();
  return model;
}

std::unique_ptr<Model> outline_model(ModelOptions options, Communicator& tp) {
  options.device = at::kMeta;
  return load_model(options, tp);
}

LinearReader::LinearReader(const std::string& folder) : folder_(folder) {
  ModelOptions options;
  options.path = folder;
  options.max_positions = 1;
  const std::string config_json = model_config_json(options), origin = origin_of(options);
  if (const auto stored = stored_as_nf4(config_json, origin)) {
    options.quantization = "nf4";
    options.double_quant = stored->double_quant;
  }
  Ledger ledger;
  outline_ = outline_model(options, *make_solo_communicator(at::kCPU, ledger));
  source_ = weights_of(options, read_config(config_json, origin).names);
}

at::Tensor LinearReader::read(const std::string& module) {
  for (const AdaptedLinear* linear : outline_->linears()) {
    const LinearSite& site = linear->site();
    if (site.name != module) continue;
    const std::string name = module + ".weight";
    if (const auto quantised = source_->read_nf4(name, {site.out, site.in})) {
      return ops::nf4_dequantise(*quantised, at::kFloat);
    }
    if (!site.fan_in_fan_out) return source_->read(name, {site.out, site.in}, {}).to(at::kFloat);
    return source_->read(name, {site.in, site.out}, {}).t().to(at::kFloat);
  }
  throw InputError(fmt::format("{}: the model has no linear {}. The adapter is of another model.", folder_, module));
}

}  // namespace corank
