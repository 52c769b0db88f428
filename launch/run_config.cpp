#include "launch/run_config.h"

#include <fmt/format.h>

#include <cmath>

#include "comm/backends.h"
#include "configs/reader.h"
#include "configs/writer.h"
#include "data/file.h"
#include "launch/versions.h"
#include "trainer/methods/config_keys.h"
#include "trainer/methods/methods.h"

namespace corank {
namespace {

// Far beyond any use: what is larger is a typing error, and would only show once the memory is full.
constexpr int64_t kMaxBatchSize = 1'000'000;
constexpr int64_t kMaxRanks = int64_t{1} << 20;
constexpr int64_t kMaxSeqLen = int64_t{1} << 20;
constexpr double kMaxEpochs = 1e6;
constexpr double kMaxPackedEpochs = 1e4;  // packing makes epochs differ in length: each is counted

int64_t positive(const Section& section, const std::string& key, int64_t value) {
  if (value <= 0) section.fail(key, fmt::format("{} is not positive", value));
  return value;
}

int64_t not_negative(const Section& section, const std::string& key, int64_t value) {
  if (value < 0) section.fail(key, fmt::format("{} is negative", value));
  return value;
}

template <class T>
T within(const Section& section, const std::string& key, T value, T low, T high) {
  if (!(value >= low && value <= high)) section.fail(key, fmt::format("{} is not in [{}, {}]", value, low, high));
  return value;
}

void read_model(const Section& s, ModelOptions& m) {
  m.path = s.get<std::string>("path", "");
  m.shape = s.get<std::string>("shape", "");
  if (m.path.empty() == m.shape.empty())
    s.fail("path", "name a model folder (path) or a shape with random weights, one of both");
  m.dtype = s.get_choice("dtype", "bfloat16", {"float32", "bfloat16"}) == "float32" ? at::kFloat : at::kBFloat16;
  m.quantization = s.get_choice("quantization", "none", format_names());
  if (m.quantization != "nf4" && s.has("double_quant")) {
    s.fail("double_quant", fmt::format("belongs to quantization nf4, not to {}; leave it out", m.quantization));
  }
  m.double_quant = s.get<bool>("double_quant", m.double_quant);
}

void read_data(const Section& s, DataConfig& d) {
  d.train = s.get<std::string>("train", "");
  d.eval = s.get<std::string>("eval", "");
  d.seq_len = within<int64_t>(s, "seq_len", s.get<int64_t>("seq_len", d.seq_len), 2, kMaxSeqLen);
  d.packing = s.get<bool>("packing", d.packing);
  d.shuffle = s.get<bool>("shuffle", d.shuffle);
}

void read_parallel(const Section& s, ParallelConfig& p) {
  p.tensor = within<int64_t>(s, "tensor", s.get<int64_t>("tensor", p.tensor), 1, kMaxRanks);
  p.backend = s.get_choice("backend", default_backend(), backend_names());
  p.shard_base = s.get_choice("shard_base", p.shard_base, shard_base_names());
}

Checkpointing checkpointing_of(const std::string& name) {
  return name == "full" ? Checkpointing::full : name == "mlp" ? Checkpointing::mlp : Checkpointing::none;
}

std::string name_of(Checkpointing c) {
  return c == Checkpointing::full ? "full" : c == Checkpointing::mlp ? "mlp" : "none";
}

void read_steps(const Section& s, TrainConfig& t) {
  t.max_steps = s.get_optional<int64_t>("max_steps");
  t.num_train_epochs = s.get_optional<double>("num_train_epochs");
  if (t.max_steps) positive(s, "max_steps", *t.max_steps);
  if (t.num_train_epochs && !(*t.num_train_epochs > 0)) s.fail("num_train_epochs", "not positive");
  if (t.num_train_epochs) within<double>(s, "num_train_epochs", *t.num_train_epochs, 0, kMaxEpochs);
  if (t.max_steps && t.num_train_epochs) s.fail("max_steps", "contradicts num_train_epochs; give one of them");
  t.warmup_steps = s.get_optional<int64_t>("warmup_steps");
  t.warmup_ratio = s.get_optional<double>("warmup_ratio");
  if (t.warmup_steps) not_negative(s, "warmup_steps", *t.warmup_steps);
  if (t.warmup_ratio) within<double>(s, "warmup_ratio", *t.warmup_ratio, 0, 1);
  if (t.warmup_steps && t.warmup_ratio) s.fail("warmup_steps", "contradicts warmup_ratio; give one of them");
}

int64_t read_batch_size(const Section& s, const std::string& key, int64_t default_value) {
  return within<int64_t>(s, key, s.get<int64_t>(key, default_value), 1, kMaxBatchSize);
}

double read_number(const Section& s, const std::string& key, double default_value, double low, double high) {
  return within(s, key, s.get<double>(key, default_value), low, high);
}

void read_optimizer(const Section& s, OptimizerOptions& o) {
  o.weight_decay = read_number(s, "weight_decay", 0, 0, 1e6);
  o.adamw.beta1 = read_number(s, "adam_beta1", o.adamw.beta1, 0, 1);
  o.adamw.beta2 = read_number(s, "adam_beta2", o.adamw.beta2, 0, 1);
  o.adamw.epsilon = read_number(s, "adam_epsilon", o.adamw.epsilon, 0, 1);
  // Each would divide by zero.
  if (o.adamw.beta1 == 1) s.fail("adam_beta1", "1 is not below 1");
  if (o.adamw.beta2 == 1) s.fail("adam_beta2", "1 is not below 1");
  if (static_cast<float>(o.adamw.epsilon) == 0)
    s.fail("adam_epsilon", fmt::format("{} is not above 0 in float32", o.adamw.epsilon));
}

void read_train(const Section& s, TrainConfig& t, ModelOptions& model) {
  read_steps(s, t);
  t.global_batch_size = read_batch_size(s, "global_batch_size", t.global_batch_size);
  t.micro_batch_size = read_batch_size(s, "micro_batch_size", t.micro_batch_size);
  t.learning_rate = read_number(s, "learning_rate", t.learning_rate, 0, 1e6);
  t.lr_scheduler_type = s.get_choice("lr_scheduler_type", t.lr_scheduler_type, {"constant", "linear", "cosine"});
  read_optimizer(s, t.optimizer);
  t.max_grad_norm = read_number(s, "max_grad_norm", t.max_grad_norm, 0, 1e30);
  t.seed = not_negative(s, "seed", s.get<int64_t>("seed", t.seed));
  model.checkpointing = checkpointing_of(s.get_choice("activation_checkpointing", "none", {"none", "mlp", "full"}));
  if (s.get<bool>("reproducible", false)) {
    s.fail("reproducible",
           "bits that do not depend on the number of data-parallel ranks are not built yet; leave it out");
  }
}

std::string model_yaml(const ModelOptions& m) {
  return fmt::format("  dtype: {}\n  quantization: {}\n{}", m.dtype == at::kFloat ? "float32" : "bfloat16",
                     m.quantization,
                     m.quantization == "nf4" ? fmt::format("  double_quant: {}\n", m.double_quant) : "");
}

std::string adapter_yaml(const AdapterConfig& a) {
  std::string text = "adapter:\n";
  for (const AdapterKey& key : adapter_keys()) {
    const std::string value = key.of(a.method) ? key.yaml(a) : "";
    if (!value.empty()) text += fmt::format("  {}: {}\n", key.name, value);
  }
  return text;
}

std::string data_files_yaml(const DataConfig& d) {
  std::string text;
  if (!d.train.empty()) text += "  train: " + yaml::quoted(d.train) + "\n";
  if (!d.eval.empty()) text += "  eval: " + yaml::quoted(d.eval) + "\n";
  return text;
}

std::string data_yaml(const DataConfig& d) {
  return fmt::format("  seq_len: {}\n  packing: {}\n  shuffle: {}\n", d.seq_len, d.packing, d.shuffle);
}

std::string train_yaml(const TrainConfig& t, Checkpointing checkpointing) {
  std::string text = "train:\n";
  if (t.max_steps) text += fmt::format("  max_steps: {}\n", *t.max_steps);
  if (t.num_train_epochs) text += fmt::format("  num_train_epochs: {}\n", *t.num_train_epochs);
  if (t.warmup_steps) text += fmt::format("  warmup_steps: {}\n", *t.warmup_steps);
  if (t.warmup_ratio) text += fmt::format("  warmup_ratio: {}\n", *t.warmup_ratio);
  return text + fmt::format(
                    "  global_batch_size: {}\n  micro_batch_size: {}\n  learning_rate: {}\n  lr_scheduler_type: {}\n"
                    "  weight_decay: {}\n  adam_beta1: {}\n  adam_beta2: {}\n  adam_epsilon: {}\n  max_grad_norm: {}\n"
                    "  seed: {}\n  activation_checkpointing: {}\n  reproducible: false\n",
                    t.global_batch_size, t.micro_batch_size, t.learning_rate, t.lr_scheduler_type,
                    t.optimizer.weight_decay, t.optimizer.adamw.beta1, t.optimizer.adamw.beta2,
                    t.optimizer.adamw.epsilon, t.max_grad_norm, t.seed, name_of(checkpointing));
}

}  // namespace

RunConfig read_run(const std::string& path, const std::vector<std::string>& overrides) {
  const Section file = Section::load(path, overrides);
  RunConfig run;
  run.file = path;
  read_model(file.section("model"), run.model);
  const Section adapter = file.section("adapter");
  run.adapter = read_adapter_config(adapter);
  if (run.model.quantization != "none" && make_method(run.adapter)->trains_base()) {
    file.section("model").fail("quantization", fmt::format("weights in {} cannot train, and method {} trains them",
                                                           run.model.quantization, run.adapter.method));
  }
  for (const AdapterKey& key : adapter_keys()) {
    if (adapter.has(key.name)) run.adapter_keys.push_back(key.name);
  }
  read_data(file.section("data"), run.data);
  read_parallel(file.section("parallel"), run.parallel);
  read_train(file.section("train"), run.train, run.model);
  if (run.data.packing && run.train.num_train_epochs.value_or(0) > kMaxPackedEpochs) {
    file.section("train").fail("num_train_epochs", fmt::format("{} is more than the {} that data.packing allows",
                                                               *run.train.num_train_epochs, kMaxPackedEpochs));
  }
  run.output_dir = file.get<std::string>("output_dir", "");
  run.logging_steps = positive(file, "logging_steps", file.get<int64_t>("logging_steps", 1));
  run.eval_steps = not_negative(file, "eval_steps", file.get<int64_t>("eval_steps", 0));
  run.save_steps = not_negative(file, "save_steps", file.get<int64_t>("save_steps", 0));
  run.save_total_limit = positive(file, "save_total_limit", file.get<int64_t>("save_total_limit", 3));
  run.resume = file.get<std::string>("resume", "auto");
  file.done();
  run.model.max_positions = run.data.seq_len;
  run.model.seed = static_cast<uint64_t>(run.train.seed);
  return run;
}

RunIdentity identity_of(const RunConfig& run, const TokenFile& data) {
  std::string settings = run.result_settings() + data.fingerprint() + model_config_json(run.model);
  // Without them the order of the others is another one, which a run that had them all does not go on with.
  if (Sampler(data, run.loader_options(0, 1).sampler).num_used() < data.size()) settings += "some samples left out\n";
  return {sha256(settings), run.adapter, run.model.path.empty() ? run.model.shape : run.model.path, library_versions()};
}

LoaderOptions RunConfig::loader_options(int dp_rank, int dp_size) const {
  return {{data.seq_len, data.packing, data.shuffle, train.seed},
          train.global_batch_size,
          train.micro_batch_size,
          dp_rank,
          dp_size};
}

Schedule RunConfig::schedule(int64_t total_steps) const {
  int64_t warmup = train.warmup_steps.value_or(0);
  if (train.warmup_ratio)
    warmup = static_cast<int64_t>(std::ceil(*train.warmup_ratio * static_cast<double>(total_steps)));
  return {train.lr_scheduler_type, train.learning_rate, warmup, total_steps};
}

std::string RunConfig::result_settings() const {
  return model_yaml(model) + adapter_yaml(adapter) + data_yaml(data) + train_yaml(train, model.checkpointing);
}

std::string RunConfig::yaml() const {
  const std::string place =
      model.path.empty() ? "shape: " + yaml::quoted(model.shape) : "path: " + yaml::quoted(model.path);
  std::string text = "model:\n  " + place + "\n" + model_yaml(model) + adapter_yaml(adapter);
  text += "data:\n" + data_files_yaml(data) + data_yaml(data) + train_yaml(train, model.checkpointing);
  text += fmt::format("parallel:\n  tensor: {}\n  backend: {}\n  shard_base: {}\n", parallel.tensor, parallel.backend,
                      parallel.shard_base);
  if (!output_dir.empty()) text += "output_dir: " + yaml::quoted(output_dir) + "\n";
  text += fmt::format("logging_steps: {}\neval_steps: {}\nsave_steps: {}\nsave_total_limit: {}\nresume: {}\n",
                      logging_steps, eval_steps, save_steps, save_total_limit, yaml::quoted(resume));
  return text;
}

}  // namespace corank
