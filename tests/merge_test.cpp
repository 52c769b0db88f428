#include "trainer/files/merge.h"

#include <fmt/format.h>

#include <filesystem>

#include "data/storage.h"
#include "data/weight_file.h"
#include "tests/golden_case.h"
#include "trainer/files/adapter_file.h"
#include "trainer/methods/merged.h"
#include "trainer/methods/mora.h"
#include "trainer/methods/rank_budget.h"
#include "trainer/run/checkpoint.h"
#include "trainer/run/generation.h"

// Merged folders: against PEFT's merged weights (make_methods.py), and against the adapter beside the base. Bounds:
// methods 13, row 14.
namespace corank::test {
namespace {

using nlohmann::json;

ModelOptions merge_model_at(const std::string& path, at::ScalarType dtype = at::kFloat,
                            const std::string& quantization = "none") {
  ModelOptions options;
  options.path = path;
  options.dtype = dtype;
  options.quantization = quantization;
  options.max_positions = 64;
  return options;
}

/// The model at `options` alone, or with an adapter.
at::Tensor logits_of(const ModelOptions& options, const std::vector<int64_t>& tokens,
                     const SavedAdapter* adapter = nullptr) {
  if (adapter) {
    const TrainingRun run(nullptr, 1, options, adapter->config, {}, 42, adapter);
    return all_logits(*run.model, tokens, run.mesh.tp());
  }
  Ledger ledger;
  const auto solo = make_solo_communicator(at::kCPU, ledger);
  return all_logits(*load_model(options, *solo), tokens, *solo);
}

/// A folder with the model of `from`, its floating tensors in `dtype`.
void write_in(at::ScalarType dtype, const std::string& from, const std::string& to) {
  WeightFile file(from);
  NamedTensors tensors;
  for (const std::string& name : file.names()) tensors.emplace_back(name, file.read(name).to(dtype));
  DiskStorage().make_folders(to);
  DiskStorage().write_file(to + "/model.safetensors", safetensors_image(tensors));
  DiskStorage().write_file(to + "/config.json", read_file(from + "/config.json"));
}

/// Values of bfloat16 in order, as whole numbers.
at::Tensor steps_of(const at::Tensor& t) {
  const at::Tensor bits = t.contiguous().view(at::kShort).to(at::kInt);
  return at::where(bits < 0, -32768 - bits, bits);
}

struct Case {
  std::string name, adapter, base;
  std::string logits;  ///< golden case of its logits
};

const Case kCases[] = {
    {"llama", "llama/adapter", "llama", "llama"},
    {"llama_tied_llama3rope", "llama_tied_llama3rope/adapter", "llama_tied_llama3rope", "llama_tied_llama3rope"},
    {"rslora", "methods/rslora/adapter", "llama", "methods/rslora"},
    {"dora", "methods/dora/adapter", "llama", "methods/dora"},
    {"adalora", "methods/adalora/adapter", "llama", "methods/adalora"},
    {"adalora_final", "methods/adalora/adapter_final", "llama", ""},
    {"pissa", "", "llama", "methods/pissa"},
    {"modules_to_save", "methods/modules_to_save/adapter", "llama", "methods/modules_to_save"},
    {"phi3", "families/phi3/adapter", "families/phi3", "families/phi3"},
    {"gpt2", "families/gpt2/adapter", "families/gpt2", "families/gpt2"},
};

class MergeGolden : public testing::TestWithParam<Case> {
 protected:
  std::string base() const { return golden(GetParam().base + "/model"); }
  std::string merged() const { return folder_.path("merged"); }

  /// PiSSA's is a checkpoint: the factors and those that it started with.
  SavedAdapter adapter() const {
    if (!GetParam().adapter.empty()) return read_adapter(golden(GetParam().adapter));
    SavedAdapter file;
    file.config.method = "pissa";
    file.config.r = 4;
    file.config.lora_alpha = 8;
    for (const auto& [folder, first] : {std::pair{"adapter", false}, std::pair{"adapter_init", true}}) {
      const SafetensorsFile part(golden(fmt::format("methods/pissa/{}/adapter_model.safetensors", folder)));
      for (const auto& entry : part.tensors()) {
        std::string name = entry.first;
        if (first) name.replace(name.rfind(".lora_"), 6, ".pissa_");
        file.tensors.emplace_back(name, part.read(entry.first));
      }
    }
    DiskStorage().write_file(folder_.path("pissa.h5"), adapter_h5_image(file));
    return read_adapter(folder_.path("pissa.h5"));
  }

  /// Weights of the case in PEFT's file, by the names that the model's files have.
  std::map<std::string, at::Tensor> expected(const std::string& prefix) const {
    const SafetensorsFile file(golden("methods/merged.safetensors"));
    std::map<std::string, at::Tensor> found;
    for (const auto& entry : file.tensors()) {
      if (!entry.first.starts_with(prefix)) continue;
      const std::string root = GetParam().name == "gpt2" ? "transformer." : "model.";
      found.emplace(root + entry.first.substr(prefix.size()), file.read(entry.first));
    }
    EXPECT_GE(found.size(), 2u);
    return found;
  }

  TemporaryFolder folder_;
};

TEST_P(MergeGolden, WeightsAndLogitsAreThoseOfPeft) {
  DiskStorage disk;
  disk.make_folders(merged());
  const SavedAdapter file = adapter();
  const MergeResult result = write_merged_model(disk, merged(), merge_model_at(base()), file, false);
  WeightFile ours(merged()), theirs(base());
  EXPECT_EQ(result.tensors, static_cast<int64_t>(theirs.names().size()));
  EXPECT_EQ(result.merged, static_cast<int64_t>(adapted_modules(file).size()));
  EXPECT_EQ(ours.names(), theirs.names());
  for (const auto& [name, weight] : expected(GetParam().name + ".")) {
    EXPECT_LT(relative_error(ours.read(name), weight), 1e-6) << name;
    // The test of the test.
    EXPECT_GT(relative_error(theirs.read(name), weight), 1e-4) << name;
  }
  EXPECT_EQ(read_file(merged() + "/config.json"), read_file(base() + "/config.json"));
  if (GetParam().logits.empty()) return;
  const Golden reference(GetParam().logits);
  EXPECT_LT(relative_error(logits_of(merge_model_at(merged()), reference.tokens(0)), reference.value("logits.0")),
            1e-5);
}

TEST_P(MergeGolden, WhatNoAdapterTouchesStaysToTheByte) {
  DiskStorage disk;
  disk.make_folders(merged());
  const SavedAdapter file = adapter();
  write_merged_model(disk, merged(), merge_model_at(base()), file, false);
  WeightFile ours(merged()), theirs(base());
  std::set<std::string> touched;
  for (const std::string& module : adapted_modules(file)) touched.insert(module + ".weight");
  for (const auto& entry : file.tensors) touched.insert(entry.first.substr(std::string("base_model.model.").size()));
  for (const std::string& name : theirs.names()) {
    EXPECT_EQ(at::equal(ours.read(name), theirs.read(name)), !touched.contains(name)) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, MergeGolden, testing::ValuesIn(kCases),
                         [](const auto& param) { return param.param.name; });

class MergeBFloat16 : public MergeGolden {};

TEST_P(MergeBFloat16, IsRoundedOnceAndOneStepFromPeftAtMost) {
  const std::string low = folder_.path("bf16");
  write_in(at::kBFloat16, base(), low);
  DiskStorage disk;
  disk.make_folders(merged());
  const SavedAdapter file = adapter();
  write_merged_model(disk, merged(), merge_model_at(low), file, false);
  WeightFile ours(merged()), exact(low);
  for (const auto& [name, weight] : expected("bf16." + GetParam().name + ".")) {
    const at::Tensor found = ours.read(name);
    ASSERT_EQ(found.scalar_type(), at::kBFloat16);
    const at::Tensor distance = (steps_of(found) - steps_of(weight)).abs();
    EXPECT_LE(distance.max().item<int64_t>(), 1) << name;
    const auto method = make_method(file.config);
    const std::string module = name.substr(0, name.rfind('.'));
    const bool transposed = GetParam().name == "gpt2";
    const at::Tensor w = exact.read(name).to(at::kFloat), w_OI = transposed ? w.t() : w;
    const at::Tensor sum = method->merged(module, module_tensors(file.tensors, module, at::kFloat), w_OI);
    EXPECT_TRUE(at::equal(found, (transposed ? sum.t() : sum).to(at::kBFloat16))) << name;
    // The test of the test: an update that is rounded before it is added gives other bits.
    const at::Tensor twice = w_OI + (sum - w_OI).to(at::kBFloat16).to(at::kFloat);
    EXPECT_FALSE(at::equal(found, (transposed ? twice.t() : twice).to(at::kBFloat16))) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, MergeBFloat16, testing::Values(kCases[0], kCases[3], kCases[4], kCases[9]),
                         [](const auto& param) { return param.param.name; });

/// An adapter of `config` after three steps on the model, as its run leaves it; `logits` of the run itself.
SavedAdapter trained(const ModelOptions& options, const AdapterConfig& config, const std::string& path,
                     at::Tensor* logits = nullptr) {
  TrainingRun run(nullptr, 1, options, config);
  const Golden llama("llama");
  for (int64_t step = 1; step <= 3; ++step) run.step(llama.batches(), step, 1e-2);
  if (logits) *logits = all_logits(*run.model, llama.tokens(0), run.mesh.tp());
  const SavedAdapter file = collect_adapter(run.store, *run.method, {"", config, ""}, run.mesh.tp());
  DiskStorage().write_file(path, adapter_h5_image(file));
  return read_adapter(path);
}

class Merge : public testing::Test {
 protected:
  std::string path(const std::string& name) const { return folder_.path(name); }
  MergeResult merge(const ModelOptions& options, const SavedAdapter& adapter, bool dequantize = false) const {
    DiskStorage disk;
    disk.make_folders(path("merged"));
    return write_merged_model(disk, path("merged"), options, adapter, dequantize);
  }

  std::string base_ = golden("llama/model");
  std::vector<int64_t> tokens_ = Golden("llama").tokens(0);
  TemporaryFolder folder_;
};

TEST_F(Merge, EveryMethodAfterTrainingIsItsMergedModel) {
  for (const auto& [method, type] :
       {std::pair{"lora", 1}, {"dora", 1}, {"adalora", 1}, {"mora", 1}, {"mora", 2}, {"mora", 6}, {"pissa", 1}}) {
    SCOPED_TRACE(fmt::format("{} {}", method, type));
    AdapterConfig config;
    config.method = method;
    config.options.edit<MoraConfig>().type = type;
    config.options.edit<AdaLoraConfig>() = {
        .init_r = 6, .target_r = 3, .tinit = 1, .tfinal = 2, .deltaT = 1, .total_step = 6, .kept_ranks = {}};
    const SavedAdapter adapter = trained(merge_model_at(base_), config, path("adapter.h5"));
    merge(merge_model_at(base_), adapter);
    const at::Tensor merged = logits_of(merge_model_at(path("merged")), tokens_);
    EXPECT_LT(relative_error(merged, logits_of(merge_model_at(base_), tokens_, &adapter)), 1e-5);
    EXPECT_GT(relative_error(merged, logits_of(merge_model_at(base_), tokens_)), 1e-3);
  }
}

TEST_F(Merge, AQuantisedBaseIsTakenAsTheRunOrAsTheFolderHasIt) {
  for (const std::string quantization : {"nf4", "int8"}) {
    for (const char* method : {"lora", "dora"}) {
      SCOPED_TRACE(quantization + " " + method);
      AdapterConfig config;
      config.method = method;
      const ModelOptions run = merge_model_at(base_, at::kFloat, quantization);
      const SavedAdapter adapter = trained(run, config, path("adapter.h5"));
      merge(run, adapter, /*dequantize=*/true);
      const at::Tensor as_trained = logits_of(run, tokens_, &adapter);
      EXPECT_LT(relative_error(logits_of(merge_model_at(path("merged")), tokens_), as_trained), 1e-5);
      merge(run, adapter, /*dequantize=*/false);
      const at::Tensor original = logits_of(merge_model_at(path("merged")), tokens_);
      EXPECT_LT(relative_error(original, logits_of(merge_model_at(base_), tokens_, &adapter)), 1e-5);
      EXPECT_GT(relative_error(original, as_trained), 1e-3);
    }
  }
}

/// Its base was quantised without the leading singular part, so its exchange form fits the folder's weights better.
TEST_F(Merge, QPissaIsNearerOnTheOriginalBase) {
  AdapterConfig config;
  config.method = "pissa";
  const ModelOptions run = merge_model_at(base_, at::kFloat, "nf4");
  at::Tensor as_trained;
  const SavedAdapter adapter = trained(run, config, path("adapter.h5"), &as_trained);
  const auto error = [&](bool dequantize) {
    merge(run, adapter, dequantize);
    return relative_error(logits_of(merge_model_at(path("merged")), tokens_), as_trained);
  };
  EXPECT_LT(error(false), error(true));
}

TEST_F(Merge, ABitsandbytesFolderBecomesAnOrdinaryOne) {
  const std::string quantised = golden("methods/llama_nf4/model");
  const SavedAdapter adapter = read_adapter(golden("llama/adapter"));
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const ModelOptions run = merge_model_at(quantised, dtype, "nf4");
    merge(run, adapter, /*dequantize=*/true);
    WeightFile merged(path("merged"));
    EXPECT_EQ(merged.names(), WeightFile(base_).names());
    EXPECT_EQ(merged.info("model.layers.0.mlp.down_proj.weight").dtype, dtype);
    EXPECT_EQ(merged.info("model.norm.weight").dtype, at::kFloat);
    const json config = json::parse(read_file(path("merged/config.json")));
    EXPECT_FALSE(config.contains("quantization_config"));
    EXPECT_EQ(config["dtype"], dtype == at::kFloat ? "float32" : "bfloat16");
    const double bound = dtype == at::kFloat ? 1e-5 : 2e-2;
    EXPECT_LT(
        relative_error(logits_of(merge_model_at(path("merged"), dtype), tokens_), logits_of(run, tokens_, &adapter)),
        bound);
  }
  EXPECT_THROW(merge(merge_model_at(quantised, at::kFloat, "nf4"), adapter, /*dequantize=*/false), ConfigError);
}

TEST_F(Merge, ShardsStayShards) {
  WeightFile file(base_);
  std::map<std::string, NamedTensors> shards;
  json map;
  for (const std::string& name : file.names()) {
    const std::string shard =
        name < "model.layers.1" ? "model-00001-of-00002.safetensors" : "model-00002-of-00002.safetensors";
    shards[shard].emplace_back(name, file.read(name));
    map[name] = shard;
  }
  DiskStorage().make_folders(path("base"));
  for (const auto& [name, tensors] : shards) {
    DiskStorage().write_file(path("base/" + name), safetensors_image(tensors, {{"format", "pt"}, {"note", "kept"}}));
  }
  DiskStorage().write_file(path("base/model.safetensors.index.json"),
                           json{{"metadata", {{"total_size", 1}, {"note", "kept"}}}, {"weight_map", map}}.dump());
  for (const auto& [name, text] : {std::pair{"config.json", read_file(base_ + "/config.json")},
                                   {"tokenizer.json", std::string("{}")},
                                   {"adapter_config.json", std::string("{}")},
                                   {"pytorch_model.bin", std::string("old")}}) {
    DiskStorage().write_file(path(std::string("base/") + name), text);
  }
  const SavedAdapter adapter = read_adapter(golden("llama/adapter"));
  const MergeResult result = merge(merge_model_at(path("base")), adapter);
  const json index = json::parse(read_file(path("merged/model.safetensors.index.json")));
  EXPECT_EQ(index["weight_map"], map);
  EXPECT_EQ(index["metadata"]["total_size"], result.bytes);
  EXPECT_EQ(index["metadata"]["note"], "kept");
  EXPECT_EQ(SafetensorsFile(path("merged/model-00001-of-00002.safetensors")).metadata().at("note"), "kept");
  EXPECT_EQ(read_file(path("merged/tokenizer.json")), "{}");
  EXPECT_FALSE(std::filesystem::exists(path("merged/adapter_config.json")));
  EXPECT_FALSE(std::filesystem::exists(path("merged/pytorch_model.bin")));
  DiskStorage disk;
  disk.make_folders(path("single"));
  write_merged_model(disk, path("single"), merge_model_at(base_), adapter, false);
  WeightFile sharded(path("merged")), single(path("single"));
  for (const std::string& name : single.names()) EXPECT_TRUE(at::equal(sharded.read(name), single.read(name))) << name;
}

TEST_F(Merge, FoldersOfTheBareModelKeepTheirNames) {
  const std::string whole = golden("families/gpt2/model");
  WeightFile file(whole);
  NamedTensors tensors;
  for (const std::string& name : file.names()) tensors.emplace_back(name.substr(12), file.read(name));
  DiskStorage().make_folders(path("bare"));
  DiskStorage().write_file(path("bare/model.safetensors"), safetensors_image(tensors));
  DiskStorage().write_file(path("bare/config.json"), read_file(whole + "/config.json"));
  const SavedAdapter adapter = read_adapter(golden("families/gpt2/adapter"));
  merge(merge_model_at(path("bare")), adapter);
  EXPECT_TRUE(WeightFile(path("merged")).has("h.0.attn.c_attn.weight"));
  const Golden gpt2("families/gpt2");
  EXPECT_LT(relative_error(logits_of(merge_model_at(path("merged")), gpt2.tokens(0)), gpt2.value("logits.0")), 1e-5);
}

TEST_F(Merge, WhatDoesNotFitOrIsNotFiniteIsRefused) {
  SavedAdapter adapter = read_adapter(golden("llama/adapter"));
  EXPECT_THROW(merge(merge_model_at(golden("llama_biased_headdim/model")), adapter), InputError);
  for (auto& [name, tensor] : adapter.tensors) tensor = tensor * 1e30;
  try {
    merge(merge_model_at(base_), adapter);
    ADD_FAILURE() << "accepted";
  } catch (const InputError& e) {
    EXPECT_NE(std::string(e.what()).find("proj.weight: with the adapter it holds NaN"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace corank::test
