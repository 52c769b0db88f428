#include "data/file.h"
#include "tests/topology_cases.h"
#include "trainer/adapter/lora_factors.h"
#include "trainer/generation.h"
#include "trainer/ops/mora.h"

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
    {.name = "remora", .method = "mora", .remora_steps = 12},
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

/// Full tensors of `module` by the end of their names.
ModuleTensors tensors_of(const AdapterFile& file, const std::string& module) {
  const std::string prefix = "base_model.model." + module;
  ModuleTensors tensors;
  for (const auto& [name, tensor] : file.tensors) {
    if (name.starts_with(prefix + ".")) tensors.emplace(name.substr(prefix.size()), tensor);
  }
  return tensors;
}

/// What a linear makes of inputs is their product with the weight that its method calls merged, in every layout.
class Merged : public Topology {
 protected:
  /// y [N, out] of the whole linear; x [N, in].
  static at::Tensor forward(const AdaptedLinear& linear, const at::Tensor& x, const ForwardContext& context) {
    const LinearSite& site = linear.site();
    const bool row = site.row();
    at::Tensor y = ops::linear(row ? take_shard(x, with_dim(site.in_shard, 1)) : x, {linear.projection(context)})[0];
    if (!row) return gather_shards(y, with_dim(site.out_shard, 1), {x.size(0), site.out}, context.tp);
    context.tp.all_reduce(y, ReduceOp::sum, Purpose::startup);
    return y;
  }

  /// The whole frozen weight as the run has it.
  static at::Tensor base_of(const AdaptedLinear& linear, Communicator& tp) {
    const LinearSite& site = linear.site();
    const Shard shard = site.row() ? with_dim(site.in_shard, 1) : site.out_shard;
    return gather_shards(linear.weight().dense_OI(), shard, {site.out, site.in}, tp);
  }

  static Shard with_dim(Shard shard, int dim) {
    if (!shard.whole()) shard.dim = dim;
    return shard;
  }
};

TEST_P(Merged, ForwardIsTheProductWithTheMergedWeight) {
  const Setting setting = GetParam();
  const at::AutoGradMode no_grad(false);
  for (const int tensor : {1, 2, 4}) {
    if (test_world().size() % tensor != 0) continue;
    TrainingRun run(&test_world(), tensor, tiny(setting), adapter(setting));
    Loader batches(data_, loader(setting, &run.mesh));
    {
      const at::AutoGradMode grad(true);
      for (int64_t step = 1; step <= 3; ++step) run.step(batches.next(), step, rate(setting));
    }
    const AdapterFile file = collect_adapter(run.store, *run.method, {"", adapter(setting), ""}, run.mesh.tp());
    const Batch batch = make_batch({{}}, 0, 64).to(run.mesh.device());
    SegmentAttention attention(batch);
    const ForwardContext context{batch, attention, run.mesh.tp()};
    for (const AdaptedLinear* linear : run.model->linears()) {
      const LinearSite& site = linear->site();
      at::Tensor x = at::arange(5 * site.in, at::TensorOptions(at::kFloat)).sin_().view({5, site.in});
      const bool changes_base = setting.method == "pissa" || setting.remora_steps > 0;
      const at::Tensor base = changes_base ? linear->read_base() : base_of(*linear, run.mesh.tp());
      const at::Tensor merged = run.method->merged(site.name, tensors_of(file, site.name), base.to(at::kCPU));
      const at::Tensor y = forward(*linear, x.to(run.mesh.device()), context);
      EXPECT_LT(relative_error(y, at::mm(x, merged.t())), 1e-5) << site.name << " tp " << tensor;
      // The test of the test: the update is large enough to be seen.
      EXPECT_GT(relative_error(merged, base), 1e-4) << site.name;
    }
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

INSTANTIATE_TEST_SUITE_P(Methods, Merged, testing::ValuesIn(kMerged), case_name);
INSTANTIATE_TEST_SUITE_P(Methods, Topology, testing::ValuesIn(kMethods), case_name);
INSTANTIATE_TEST_SUITE_P(Methods, Resume, testing::ValuesIn(kResumed), case_name);

/// ReMoRA's restarts.
class Remora : public testing::Test {
 protected:
  static constexpr int64_t kSpan = 3;

  Remora() : run_(&test_world(), test_world().size() % 2 == 0 ? 2 : 1, tiny(setting_), adapter(setting_)) {
    Loader batches(data_, loader(setting_, &run_.mesh));
    for (int64_t step = 1; step < kSpan; ++step) run_.step(batches.next(), step, rate(setting_));
  }

  void restart() { run_.method->on_step_end(kSpan, *run_.optimizer, run_.mesh); }
  /// Logits of some tokens.
  static at::Tensor logits(const TrainingRun& run) {
    return all_logits(*run.model, {5, 80, 17, 200, 3, 99, 64}, run.mesh.tp());
  }
  AdapterFile file() const {
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
  const at::Tensor m_RR = tensors_of(file(), linear.name()).at(".lora_A.weight");
  at::Tensor merged = w_OI;
  for (const ops::Grouping grouping : {ops::Grouping::modulo, ops::Grouping::block, ops::Grouping::modulo}) {
    run_.store.masters().copy_(matrices);
    merged = merged + ops::mora_delta(m_RR, grouping, grouping, w_OI.size(1), w_OI.size(0));
    EXPECT_LT(relative_error(run_.method->merged(linear.name(), tensors_of(file(), linear.name()), w_OI), merged),
              1e-6);
    restart();
  }
}

TEST_F(Remora, ItsFileIsTheAdapterOfALaterRunAndNoPeftFolder) {
  restart();
  const std::string path = "/adapter.h5";
  TemporaryFolder folder;
  write_file_atomically(folder.path() + path, adapter_h5_image(file()));
  const AdapterFile read = read_adapter(folder.path());
  check_adapter(read, folder.path());
  EXPECT_EQ(read.config.remora.types, (std::vector<int64_t>{1, 2}));
  EXPECT_EQ(read.config.remora.merges, 1);
  const TrainingRun later(&test_world(), 1, tiny(setting_), read.config, {}, 42, &read);
  EXPECT_LT(relative_error(logits(later), logits(run_)), 1e-5);
  try {
    write_peft_folder(folder.path("peft"), read);
    ADD_FAILURE() << "written";
  } catch (const ConfigError& e) {
    EXPECT_NE(std::string(e.what()).find("corank merge"), std::string::npos) << e.what();
  }
  AdapterFile incomplete = read;
  std::erase_if(incomplete.tensors, [&](const auto& entry) {
    return entry.first == peft_name(run_.model->linears()[0]->name(), ".remora_0");
  });
  EXPECT_THROW(check_adapter(incomplete, "incomplete"), InputError);
}

TEST_F(Remora, TheRateWarmsUpAndBiasCorrectionBeginsAnewAfterEachRestart) {
  AdapterConfig config = adapter(setting_);
  config.remora = {.steps = 100, .types = {1, 2}, .warmup_steps = 10, .merges = 0};
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
