#include "trainer/models/families.h"

#include <algorithm>

#include "comm/backends.h"
#include "trainer/models/blueprint.h"
#include "trainer/models/config_file.h"
#include "trainer/models/quantization_config.h"

namespace corank {
namespace {

constexpr Family kFamilies[] = {
    {"llama", read_llama, llama_modules}, {"qwen2", read_qwen2, llama_modules},
    {"qwen3", read_qwen3, qwen3_modules}, {"mistral", read_mistral, llama_modules},
    {"phi3", read_phi3, phi3_modules},    {"gpt2", read_gpt2, gpt2_modules},
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

std::unique_ptr<Blueprint> read_config(const std::string& config_json, const std::string& origin) {
  const ConfigFile file(config_json, origin);
  auto blueprint = family_of(file).read(file);
  refuse_other_tasks(file);
  ignore_bookkeeping(file);
  file.done();
  return blueprint;
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

std::unique_ptr<WeightSource> weights_of(const ModelOptions& options, const Blueprint& blueprint) {
  const bool outline = options.device.is_meta();
  if (options.path.empty()) return random_weights(options.seed, outline);
  auto weights = folder_weights(options.path, outline);
  const std::string embedding = blueprint.embedding(), prefix = embedding.substr(0, embedding.find('.') + 1);
  if (!WeightFile(options.path).has(embedding.substr(prefix.size()))) return weights;
  return std::make_unique<BareWeights>(std::move(weights), prefix);
}

void add_once(std::vector<std::string>& list, const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    if (std::count(list.begin(), list.end(), name) == 0) list.push_back(name);
  }
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

FamilyModules family_modules() {
  FamilyModules all;
  for (const Family& family : kFamilies) {
    const FamilyModules own = family.modules();
    add_once(all.embeddings, own.embeddings);
    add_once(all.heads, own.heads);
    add_once(all.others, own.others);
  }
  return all;
}

void check_model_config(const std::string& config_json, const std::string& origin, int tensor) {
  read_config(config_json, origin)->check_split(tensor);
  stored_as_nf4(config_json, origin);  // or refuses
}

std::unique_ptr<Model> load_model(const ModelOptions& options, Communicator& tp) {
  const std::string config_json = model_config_json(options);
  const auto blueprint = read_config(config_json, origin_of(options));
  blueprint->check_split(tp.size());
  check_stored_format(config_json, options);
  blueprint->check_positions(origin_of(options), options.max_positions);
  const std::shared_ptr<WeightSource> weights = weights_of(options, *blueprint);
  auto model = blueprint->build(options, weights, tp);
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
  source_ = weights_of(options, *read_config(config_json, origin));
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
