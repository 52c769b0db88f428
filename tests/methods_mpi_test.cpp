#include "tests/topology_cases.h"
#include "trainer/files/adapter_file.h"
#include "trainer/files/check_adapter.h"
#include "trainer/methods/adapter_set.h"
#include "trainer/methods/lora_factors.h"
#include "trainer/methods/merged.h"
#include "trainer/ops/mora.h"
#include "trainer/run/generation.h"

// Every other method of the table, and every format of the base, in every layout.
namespace corank::test {
namespace {

const Setting kMethods[] = {
    {.name = "dora", .method = "dora"},
    {.name = "dora_dropout", .method = "dora", .dropout = 0.2},
    {.name = "adalora", .method = "adalora"},
    {.name = "mora_sharing", .method = "mora"},
    {.name = "mora_blocks", .method = "mora", .mora_type = 2},
    {.name = "mora_rotation", .method = "mora", .mora_type = 6},
    {.name = "remora", .method = "mora", .remora_steps = 4},
    {.name = "pissa", .method = "pissa"},
    {.name = "pissa_nf4", .method = "pissa", .quantization = "nf4"},
    {.name = "modules_to_save", .modules_to_save = {"embed_tokens", "norm", "lm_head"}},
    {.name = "nf4", .quantization = "nf4"},
    {.name = "int8", .quantization = "int8"},
    {.name = "dora_nf4", .method = "dora", .quantization = "nf4"},
    {.name = "gpt2_dora", .method = "dora", .shape = "tiny-gpt2"},
    {.name = "gpt2_adalora", .method = "adalora", .shape = "tiny-gpt2"},
    {.name = "gpt2_pissa", .method = "pissa", .shape = "tiny-gpt2"},
    {.name = "gpt2_modules_to_save", .shape = "tiny-gpt2", .modules_to_save = {"ln_f"}},
};

const Setting kResumed[] = {
    {.name = "dora", .method = "dora", .dropout = 0.1},
    {.name = "adalora", .method = "adalora"},
    {.name = "pissa", .method = "pissa"},
    {.name = "gpt2_adalora", .method = "adalora", .shape = "tiny-gpt2"},
    {.name = "mora_rotation", .method = "mora", .mora_type = 6},
    {.name = "remora", .method = "mora", .remora_steps = 4, .modules_to_save = {"norm"}, .dropout = 0.1},
    {.name = "modules_to_save", .modules_to_save = {"embed_tokens", "norm", "lm_head"}},
    {.name = "dora_nf4", .method = "dora", .quantization = "nf4"},
};

class MergedInMemory : public Topology {};

/// Merged in memory, the model gives the same and no adapter takes part; unmerged, it is what it was, bit for bit.
TEST_P(MergedInMemory, IsTheAdapterAndGoesBackToTheBit) {
  const Setting setting = GetParam();
  const std::vector<int64_t> tokens{3, 14, 15, 92, 65, 35, 89, 79};
  for (const int tensor : tensor_sizes()) {
    TrainingRun run(&test_world(), tensor, tiny(setting), adapter(setting));
    const auto logits = [&] { return all_logits(*run.model, tokens, run.mesh.tp()); };
    const auto weights = [&] {
      const at::AutoGradMode no_grad(false);
      std::vector<at::Tensor> all;
      for (const AdaptedLinear* linear : run.model->linears()) all.push_back(linear->weight().dense_OI().clone());
      return all;
    };
    const at::Tensor untrained = logits();
    Loader batches(data_, loader(setting, run.mesh));
    for (int64_t step = 1; step <= 3; ++step) run.step(batches.next(), step, rate(setting));
    const at::Tensor before = logits();
    const auto weights_before = weights();
    merge_adapter(*run.model, *run.method, run.store, run.mesh.tp());
    const Batch batch = make_batch({{}}, 0, 64);
    SegmentAttention attention(batch);
    const ForwardContext context{batch, attention, run.mesh.tp()};
    for (const AdaptedLinear* linear : run.model->linears()) {
      EXPECT_TRUE(linear->is_merged());
      EXPECT_EQ(linear->projection(context).update, nullptr);
    }
    EXPECT_LT(relative_error(logits(), before), 1e-5) << "tp " << tensor;
    EXPECT_GT(relative_error(before, untrained), 1e-3) << "nothing was trained";
    unmerge_adapter(*run.model, *run.method, run.mesh);
    const auto weights_after = weights();
    for (size_t i = 0; i < weights_before.size(); ++i) EXPECT_TRUE(at::equal(weights_after[i], weights_before[i]));
    EXPECT_TRUE(at::equal(logits(), before)) << "tp " << tensor;
  }
}

const Setting kMerged[] = {
    {.name = "lora"},
    {.name = "lora_nf4", .quantization = "nf4"},
    {.name = "lora_int8", .quantization = "int8"},
    {.name = "dora", .method = "dora"},
    {.name = "dora_nf4", .method = "dora", .quantization = "nf4"},
    {.name = "adalora", .method = "adalora"},
    {.name = "adalora_int8", .method = "adalora", .quantization = "int8"},
    {.name = "mora_1", .method = "mora"},
    {.name = "mora_2", .method = "mora", .mora_type = 2},
    {.name = "mora_3", .method = "mora", .mora_type = 3},
    {.name = "mora_4", .method = "mora", .mora_type = 4},
    {.name = "mora_6_nf4", .method = "mora", .mora_type = 6, .quantization = "nf4"},
    {.name = "remora_1", .method = "mora", .remora_steps = 1},
    {.name = "remora_2", .method = "mora", .remora_steps = 2},
    {.name = "pissa", .method = "pissa"},
};

const Setting kMergedInMemory[] = {
    {.name = "pissa_nf4", .method = "pissa", .quantization = "nf4"},
    {.name = "gpt2", .shape = "tiny-gpt2"},
    {.name = "gpt2_dora", .method = "dora", .shape = "tiny-gpt2"},
    {.name = "modules_to_save", .modules_to_save = {"embed_tokens", "norm", "lm_head"}},
};

INSTANTIATE_TEST_SUITE_P(Methods, MergedInMemory, testing::ValuesIn(kMerged), case_name);
INSTANTIATE_TEST_SUITE_P(More, MergedInMemory, testing::ValuesIn(kMergedInMemory), case_name);
INSTANTIATE_TEST_SUITE_P(Methods, Topology, testing::ValuesIn(kMethods), case_name);
INSTANTIATE_TEST_SUITE_P(Methods, Resume, testing::ValuesIn(kResumed), case_name);

/// Adapters of several methods, ranks and targets over one model.
class Switching : public testing::TestWithParam<Setting> {
 protected:
  /// As a run of three steps leaves it, on the model's own weights.
  SavedAdapter trained(const Setting& setting, const AdapterConfig& config) {
    TrainingRun run(nullptr, 1, tiny(setting), config);
    Loader batches(data_, loader(setting, run.mesh));
    for (int64_t step = 1; step <= 3; ++step) run.step(batches.next(), step, 1e-2);
    SavedAdapter file = collect_adapter(run.store, *run.method, {"", config, ""}, run.mesh.tp());
    run.method->from_checkpoint(file);
    return file;
  }

  using Logits = std::map<std::string, at::Tensor>;

  static at::Tensor logits_of(const Model& model, const Mesh& mesh) {
    return all_logits(model, {3, 14, 15, 92, 65, 35, 89, 79}, mesh.tp());
  }

  /// `alone`: of models that have one of the adapters each.
  void expect_switches(int tensor, const std::map<std::string, SavedAdapter>& files, bool merged, Logits alone) {
    SCOPED_TRACE(merged ? "merged" : "added");
    const Mesh& mesh = shared_mesh(&test_world(), tensor).mesh;
    ModelOptions options = tiny(GetParam());
    options.device = mesh.device();
    const auto model = load_model(options, mesh.tp());
    AdapterSet set(*model, mesh, options.dtype, merged);
    alone.emplace("base", logits_of(*model, mesh));
    for (const auto& [name, file] : files) set.load(name, file);
    for (const char* name : {"base", "dora", "lora", "dora", "adalora", "base", "pissa", "mora", "dora", "pissa"}) {
      set.use(name);
      EXPECT_EQ(set.in_use(), name);
      EXPECT_TRUE(at::equal(logits_of(*model, mesh), alone.at(name))) << name;
      EXPECT_EQ(at::equal(alone.at(name), alone.at("base")), name == std::string("base"));
    }
    EXPECT_THROW(set.use("nobody"), ConfigError);
    EXPECT_EQ(set.in_use(), "pissa");
  }

  TokenFile data_{repository("configs/tiny/train.h5")};
};

TEST_P(Switching, GivesTheBitsOfAModelThatHadNoOther) {
  std::map<std::string, SavedAdapter> files;
  for (const std::string method : {"lora", "dora", "adalora", "mora", "pissa"}) {
    Setting setting = GetParam();
    setting.method = method;
    AdapterConfig config = adapter(setting);
    if (method == "dora") {
      config.r = 4;
      config.all_linear = false;
      config.target_modules.names = {"q_proj", "down_proj"};
      config.modules_to_save = {"embed_tokens", "norm", "lm_head"};
    }
    files.emplace(method, trained(setting, config));
  }
  for (const int tensor : tensor_sizes()) {
    SCOPED_TRACE("tp " + std::to_string(tensor));
    Logits added, merged;
    for (const auto& [name, file] : files) {
      TrainingRun run(&test_world(), tensor, tiny(GetParam()), file.config, {}, 42, &file);
      added.emplace(name, logits_of(*run.model, run.mesh));
      merge_adapter(*run.model, *run.method, run.store, run.mesh.tp());
      merged.emplace(name, logits_of(*run.model, run.mesh));
    }
    expect_switches(tensor, files, /*merged=*/false, std::move(added));
    expect_switches(tensor, files, /*merged=*/true, std::move(merged));
  }
}

/// ReMoRA's restarts.
class Remora : public testing::Test {
 protected:
  static constexpr int64_t kSpan = 3;

  Remora() : run_(&test_world(), test_world().size() % 2 == 0 ? 2 : 1, tiny(setting_), adapter(setting_)) {
    Loader batches(data_, loader(setting_, run_.mesh));
    for (int64_t step = 1; step < kSpan; ++step) run_.step(batches.next(), step, rate(setting_));
  }

  void restart() {
    if (run_.method->on_step_end(kSpan, run_.mesh)) run_.optimizer->restart();
  }
  /// Logits of some tokens.
  static at::Tensor logits(const TrainingRun& run) {
    return all_logits(*run.model, {5, 80, 17, 200, 3, 99, 64}, run.mesh.tp());
  }
  SavedAdapter file() const {
    return collect_adapter(run_.store, *run_.method, {"", adapter(setting_), ""}, run_.mesh.tp());
  }

  Setting setting_{.name = "remora", .method = "mora", .remora_steps = kSpan};
  TokenFile data_{repository("configs/tiny/train.h5")};
  TrainingRun run_;
};

TEST_F(Remora, ForwardRightAfterARestartIsThatRightBefore) {
  const at::Tensor before = logits(run_), matrices = run_.store.masters().clone();
  restart();
  EXPECT_LT(relative_error(logits(run_), before), 1e-6);
  for (const at::Tensor& zero : {run_.store.masters(), run_.optimizer->exp_avg(), run_.optimizer->exp_avg_sq()}) {
    EXPECT_EQ(zero.abs().max().item<double>(), 0);
  }
  // The test of the test: matrices that do not start again at zero count twice.
  run_.store.masters().copy_(matrices);
  run_.store.refresh();
  EXPECT_GT(relative_error(logits(run_), before), 1e-3);
}

TEST_F(Remora, EachSpanHasTheNextType) {
  const at::Tensor matrices = run_.store.masters().clone();
  const AdaptedLinear& linear = *run_.model->linears()[0];
  const at::Tensor w_OI = linear.read_base().to(at::kCPU);
  const at::Tensor m_RR = module_tensors(file().tensors, linear.name(), at::kFloat).at(".lora_A.weight");
  at::Tensor merged = w_OI;
  for (const ops::Grouping grouping : {ops::Grouping::modulo, ops::Grouping::block, ops::Grouping::modulo}) {
    run_.store.masters().copy_(matrices);
    merged = merged + ops::mora_delta(m_RR, grouping, grouping, w_OI.size(1), w_OI.size(0));
    EXPECT_LT(relative_error(
                  run_.method->merged(linear.name(), module_tensors(file().tensors, linear.name(), at::kFloat), w_OI),
                  merged),
              1e-6);
    restart();
  }
}

TEST_F(Remora, ItsFileIsTheAdapterOfALaterRunAndNoPeftFolder) {
  restart();
  const std::string path = "/adapter.h5";
  TemporaryFolder folder;
  DiskStorage disk;
  disk.write_file(folder.path() + path, adapter_h5_image(file()));
  const SavedAdapter read = read_adapter(folder.path());
  check_adapter(read, folder.path());
  EXPECT_EQ(read.config.options.get<MoraConfig>().types, (std::vector<int64_t>{1, 2}));
  EXPECT_EQ(read.config.options.get<MoraConfig>().merges, 1);
  const TrainingRun later(&test_world(), 1, tiny(setting_), read.config, {}, 42, &read);
  EXPECT_LT(relative_error(logits(later), logits(run_)), 1e-5);
  try {
    write_peft_folder(disk, folder.path("peft"), read);
    ADD_FAILURE() << "written";
  } catch (const ConfigError& e) {
    EXPECT_NE(std::string(e.what()).find("corank merge"), std::string::npos) << e.what();
  }
  SavedAdapter incomplete = read;
  std::erase_if(incomplete.tensors, [&](const auto& entry) {
    return entry.first == peft_name(run_.model->linears()[0]->name(), ".remora_0");
  });
  EXPECT_THROW(check_adapter(incomplete, "incomplete"), InputError);
}

TEST_F(Remora, TheRateWarmsUpAndBiasCorrectionBeginsAnewAfterEachRestart) {
  AdapterConfig config = adapter(setting_);
  config.options.edit<MoraConfig>() = {.steps = 100, .types = {1, 2}, .warmup_steps = 10, .merges = 0};
  const auto method = make_method(config);
  const std::vector<std::tuple<int64_t, double, int64_t>> wanted{
      {1, 1, 1}, {5, 1, 5}, {100, 1, 100}, {101, 0, 1}, {106, 0.5, 6}, {111, 1, 11}, {200, 1, 100}, {201, 0, 1}};
  for (const auto& [step, scale, age] : wanted) {
    EXPECT_EQ(method->learning_rate_scale(step), scale) << step;
    EXPECT_EQ(method->age_of_moments(step), age) << step;
  }
}

TEST_F(Remora, QuantisedWeightsAreRefused) {
  for (const char* format : {"nf4", "int8"}) {
    setting_.quantization = format;
    try {
      TrainingRun run(&test_world(), 1, tiny(setting_), adapter(setting_));
      ADD_FAILURE() << format;
    } catch (const ConfigError& e) {
      EXPECT_NE(std::string(e.what()).find("remora_steps"), std::string::npos) << e.what();
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Bases, Switching,
                         testing::Values(Setting{.name = "float32"},
                                         Setting{.name = "bfloat16", .dtype = at::kBFloat16},
                                         Setting{.name = "nf4", .quantization = "nf4"}),
                         case_name);

/// What no rank can hold a part of.
TEST(LinearsOfSeveralMatrices, AreRefusedByNameWhereTheyCannotBeSplit) {
  if (test_world().size() % 2 != 0) GTEST_SKIP() << "needs a split";
  for (const Setting& setting : {Setting{.name = "mora", .method = "mora", .shape = "tiny-gpt2"},
                                 Setting{.name = "nf4", .shape = "tiny-gpt2", .quantization = "nf4"},
                                 Setting{.name = "int8", .shape = "tiny-gpt2", .quantization = "int8"}}) {
    SCOPED_TRACE(setting.name);
    try {
      TrainingRun run(&test_world(), 2, tiny(setting), adapter(setting));
      ADD_FAILURE() << "accepted";
    } catch (const ConfigError& e) {
      EXPECT_NE(std::string(e.what()).find("transformer.h.0.attn.c_attn"), std::string::npos) << e.what();
    }
  }
}

}  // namespace
}  // namespace corank::test
