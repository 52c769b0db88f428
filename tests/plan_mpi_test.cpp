#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include "launch/plan.h"
#include "launch/run_config.h"
#include "tests/mpi_main.h"
#include "tests/support.h"
#include "trainer/methods/mora.h"
#include "trainer/methods/rank_budget.h"

// What the plan says of a rank against what a rank has, sends and keeps, for every method, format and layout.
namespace corank::test {
namespace {

constexpr int64_t kLength = 48, kSequences = 2;

struct PlanCase {
  std::string name, method = "lora", shape = "tiny-llama", family = {};
  std::string quantization = "none", shard_base = "none";
  int64_t mora_type = 1;
  Checkpointing checkpointing = Checkpointing::none;
  at::ScalarType dtype = at::kFloat;
  double dropout = 0;
  std::vector<std::string> targets = {}, modules_to_save = {};
};

std::ostream& operator<<(std::ostream& out, const PlanCase& one) { return out << one.name; }

const PlanCase kPlanCases[] = {
    {.name = "lora"},
    {.name = "lora_bfloat16", .dtype = at::kBFloat16},
    {.name = "lora_dropout", .dropout = 0.1},
    {.name = "lora_some_targets", .targets = {"q_proj", "v_proj"}},
    {.name = "lora_down", .targets = {"down_proj"}},
    {.name = "lora_saved", .modules_to_save = {"embed_tokens", "norm", "lm_head"}},
    {.name = "lora_mlp", .checkpointing = Checkpointing::mlp},
    {.name = "lora_recomputed", .checkpointing = Checkpointing::full},
    {.name = "lora_nf4", .quantization = "nf4"},
    {.name = "lora_int8", .quantization = "int8"},
    {.name = "lora_sharded", .shard_base = "dp"},
    {.name = "lora_sharded_nf4", .quantization = "nf4", .shard_base = "dp"},
    {.name = "dora", .method = "dora"},
    {.name = "dora_dropout", .method = "dora", .dropout = 0.1},
    {.name = "dora_nf4", .method = "dora", .quantization = "nf4"},
    {.name = "adalora", .method = "adalora"},
    {.name = "adalora_int8", .method = "adalora", .quantization = "int8"},
    {.name = "mora", .method = "mora"},
    {.name = "mora_rotation", .method = "mora", .mora_type = 6},
    {.name = "pissa", .method = "pissa"},
    {.name = "pissa_nf4", .method = "pissa", .quantization = "nf4"},
    {.name = "full", .method = "full"},
    {.name = "full_bfloat16", .method = "full", .dtype = at::kBFloat16},
    {.name = "full_recomputed", .method = "full", .checkpointing = Checkpointing::full},
    {.name = "gpt2", .shape = "tiny-gpt2"},
    {.name = "gpt2_dora", .method = "dora", .shape = "tiny-gpt2"},
    {.name = "gpt2_mlp", .shape = "tiny-gpt2", .checkpointing = Checkpointing::mlp},
    {.name = "gpt2_full", .method = "full", .shape = "tiny-gpt2"},
    {.name = "qwen3", .family = "qwen3"},
    {.name = "qwen3_dora", .method = "dora", .family = "qwen3"},
    {.name = "phi3", .family = "phi3"},
    {.name = "qwen2_dora", .method = "dora", .family = "qwen2"},
};

RunConfig run_of(const PlanCase& one) {
  RunConfig run;
  if (one.family.empty()) run.model.shape = one.shape;
  if (!one.family.empty()) run.model.path = golden("families/" + one.family + "/model");
  run.model.dtype = one.dtype;
  run.model.quantization = one.quantization;
  run.model.checkpointing = one.checkpointing;
  run.parallel.shard_base = one.shard_base;
  run.model.max_positions = kLength;
  run.adapter.method = one.method;
  run.adapter.lora_dropout = one.dropout;
  run.adapter.all_linear = one.targets.empty();
  run.adapter.target_modules.names = one.targets;
  run.adapter.modules_to_save = one.modules_to_save;
  run.adapter.options.edit<MoraConfig>().type = one.mora_type;
  run.adapter.options.edit<AdaLoraConfig>() = {
      .init_r = 6, .target_r = 3, .tinit = 1, .tfinal = 2, .deltaT = 1, .total_step = 6, .kept_ranks = {}};
  run.data.seq_len = kLength;
  run.train.micro_batch_size = kSequences;
  return run;
}

/// Bytes that this thread allocates less those that it frees, while the object lives.
class AllocatedBytes {
 public:
  AllocatedBytes() : guard_(c10::DebugInfoKind::PROFILER_STATE, reporter_) {}
  int64_t net() const { return reporter_->net; }

 private:
  struct Reporter : c10::MemoryReportingInfoBase {
    void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device) override { net += size; }
    bool memoryProfilingEnabled() const override { return true; }
    int64_t net = 0;
  };
  std::shared_ptr<Reporter> reporter_ = std::make_shared<Reporter>();
  c10::DebugInfoGuard guard_;
};

/// The micro-batches of one rank: full sequences.
StepBatches full_batches(int64_t vocab, int64_t micro_batches) {
  StepBatches step;
  for (int64_t k = 0; k < micro_batches; ++k) {
    std::vector<std::vector<Sample>> rows;
    for (int64_t s = 0; s < kSequences; ++s) {
      rows.push_back(
          {{(at::arange(kLength, at::kInt) * (s + 3) + k) % static_cast<int>(vocab), at::ones({kLength}, at::kByte)}});
    }
    step.micro_batches.push_back(make_batch(rows, k * kSequences, kLength));
    step.num_targets += step.micro_batches.back().num_targets();
    step.num_tokens += step.micro_batches.back().num_tokens();
  }
  return step;
}

class Planned : public testing::TestWithParam<PlanCase> {
 protected:
  Planned() : run_(run_of(GetParam())) {}

  static std::vector<int> splits() {
    const int ranks = test_world().size();
    return ranks == 1 ? std::vector<int>{1} : std::vector<int>{1, ranks};
  }
  TrainingRun build(int tensor) const {
    ModelOptions options = run_.model;
    options.residency = make_residency(run_.parallel.shard_base, shared_mesh(&test_world(), tensor).mesh.dp());
    return TrainingRun(&test_world(), tensor, options, run_.adapter, run_.train.optimizer);
  }
  StepShape step() const {
    return {.sequences = kSequences,
            .seq_len = kLength,
            .targets = kSequences * (kLength - 1),
            .element_bytes = run_.model.dtype == at::kFloat ? 4 : 2,
            .checkpointing = run_.model.checkpointing};
  }

  RunConfig run_;
};

int64_t state_bytes(AdapterMethod& method) {
  int64_t bytes = 0;
  for (const auto& [name, buffer] : method.state()) bytes += static_cast<int64_t>(buffer.nbytes());
  return bytes;
}

TEST_P(Planned, ParametersAndResidentBytesAreThoseOfARank) {
  for (const int tensor : splits()) {
    if (tensor > 1 && run_.adapter.method == "mora" && GetParam().shape == "tiny-gpt2") continue;
    const Outline outline = outline_of(run_, tensor, test_world().size() / tensor);
    TrainingRun run = build(tensor);
    const MemoryPlan plan = memory_of(outline, *run.method, step());
    const int64_t element = step().element_bytes, masters = static_cast<int64_t>(run.store.masters().nbytes());
    EXPECT_EQ(outline.base_parameters, num_base_parameters(*run.model));
    EXPECT_EQ(outline.trained, run.store.num_parameters());
    EXPECT_EQ(plan.adapter, masters + (element == 4 ? 0 : run.store.num_local() * element));
    EXPECT_EQ(plan.gradients, static_cast<int64_t>(run.store.gradients().nbytes()));
    int64_t in_place = 0;  // what trains in the model itself
    for (const auto& p : run.store.parameters()) {
      const bool own = run.method->trains_base() || p.spec.name.find("lora_") == std::string::npos;
      if (own) in_place += p.master.numel() * element;
    }
    int64_t biases = 0;  // which base_bytes leaves out
    for (const AdaptedLinear* linear : run.model->linears()) {
      const LinearSite& site = linear->site();
      const bool has = linear->num_base_parameters() > site.in * site.out;
      if (has) biases += element * (site.row() ? site.out : site.out / tensor);
    }
    EXPECT_EQ(plan.base + in_place, base_bytes(*run.model) + biases);
    const int64_t moments =
        static_cast<int64_t>(run.optimizer->exp_avg().nbytes() + run.optimizer->exp_avg_sq().nbytes());
    EXPECT_GE(plan.moments, moments + state_bytes(*run.method));
    EXPECT_LE(plan.moments, (moments + state_bytes(*run.method)) * 1.2);
  }
}

/// Between forward and backward.
int64_t kept_bytes(TrainingRun& run, const Batch& batch) {
  run.dropout.begin(1);
  SegmentAttention attention(batch);
  const ForwardContext context{batch, attention, run.mesh.tp(), &run.dropout};
  const AllocatedBytes allocated;
  const at::Tensor h_ND = run.model->forward(context);
  const int64_t last = static_cast<int64_t>(h_ND.nbytes());
  const at::Tensor loss = run.model->task()->loss_sum(h_ND, batch.target_rows_M, batch.targets_M, run.mesh.tp());
  return allocated.net() - last;
}

TEST_P(Planned, ActivationsAreThoseThatForwardLeaves) {
  for (const int tensor : splits()) {
    const Outline outline = outline_of(run_, tensor, test_world().size() / tensor);
    TrainingRun run = build(tensor);
    const Batch batch = full_batches(run.model->vocab_size(), 1).micro_batches[0];
    kept_bytes(run, batch);  // makes keys and caches
    const auto plan = static_cast<double>(memory_of(outline, *run.method, step()).activations);
    EXPECT_NEAR(static_cast<double>(kept_bytes(run, batch)) / plan, 1, 0.015) << "tp " << tensor;
  }
}

TEST_P(Planned, BytesAreThoseOfAStep) {
  const int ranks = test_world().size();
  for (const int tensor : splits()) {
    run_.parallel.tensor = tensor;
    run_.train.global_batch_size = 2 * kSequences * ranks / tensor;
    Cluster cluster;
    cluster.ranks = cluster.ranks_per_host = ranks;
    const Plan plan = make_plan(run_, outline_of(run_, tensor, test_world().size() / tensor), cluster);
    TrainingRun run = build(tensor);
    const Ledger::Snapshot before = run.ledger.snapshot();
    run.step(full_batches(run.model->vocab_size(), 2), 1, 1e-3);
    const Ledger::Snapshot counted = difference(run.ledger.snapshot(), before);
    std::map<Purpose, int64_t> planned;
    for (const PlannedTraffic& line : plan.traffic) planned[line.purpose] = line.payload;
    for (int p = 0; p < kNumPurposes; ++p) {
      const auto purpose = static_cast<Purpose>(p);
      EXPECT_EQ(planned[purpose], counted[p].payload_bytes) << name(purpose) << ", tp " << tensor;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, Planned, testing::ValuesIn(kPlanCases), [](const auto& one) { return one.param.name; });

RunConfig gpt3() {
  RunConfig run = read_run(repository("configs/gpt3-175b.yaml"), {});
  run.parallel.tensor = 1;
  return run;
}

/// What arXiv 2106.09685 says of GPT-3 (section 4.2, Table 4), as far as it follows from arithmetic.
TEST(Paper, CountsOfGpt3) {
  const RunConfig run = gpt3();
  const Outline outline = outline_of(run, 1, 1);
  EXPECT_NEAR(static_cast<double>(outline.base_parameters), 175e9, 1e9);
  EXPECT_EQ(outline.trained, 18'874'368);  // "18.9 M": r 4 on W_q and W_v of 96 layers
  const LinearSize projection{.name = "q", .in = 12288, .out = 12288};
  const GradientSizes one = make_method(run.adapter)->gradient_sizes(projection, 1);
  EXPECT_EQ(outline.trained, 96 * 2 * (one.everywhere + one.data));  // of separate W_q and W_v as well
  EXPECT_NEAR(static_cast<double>(outline.base_parameters) / static_cast<double>(outline.trained), 9250,
              5);                                                                // not 10,000
  EXPECT_NEAR(2.0 * static_cast<double>(outline.trained) / (1 << 20), 36, 0.1);  // "35 MB", 16 bits a number
  const double gigabytes = 2e-9 * static_cast<double>(outline.base_parameters + 100 * outline.trained);
  EXPECT_NEAR(gigabytes, 353, 0.2);  // base and 100 adapters: "354 GB"
}

TEST(Paper, MemoryOfGpt3) {
  const RunConfig run = gpt3(), full_run = as_full_fine_tuning(run);
  const StepShape step{.sequences = 1, .seq_len = 2048, .targets = 2047};
  const MemoryPlan lora = memory_of(outline_of(run, 1, 1), *make_method(run.adapter), step);
  const Outline full = outline_of(full_run, 1, 1);
  EXPECT_NEAR(static_cast<double>(lora.resident()) / 1e9, 350, 1);                    // "350 GB"
  const double sixteen_bits = 6e-9 * static_cast<double>(full.trained);               // weights and two moments
  EXPECT_NEAR(sixteen_bits / (static_cast<double>(lora.resident()) / 1e9), 3, 0.01);  // "threefold"
  const auto bytes = memory_of(full, *make_method(full_run.adapter), step).resident();
  EXPECT_EQ(bytes, 18 * full.trained);  // this program's: float32 masters, gradients and moments, bfloat16 copies
}

/// LoRA that forgets the product with A.
class Forgetful : public AdapterMethod {
 public:
  explicit Forgetful(const AdapterMethod& method) : AdapterMethod(method.config()), method_(method) {}
  void attach(Model&, ParameterStore&, uint64_t) override {}
  GradientSizes gradient_sizes(const LinearSize& linear, int tensor) const override {
    return method_.gradient_sizes(linear, tensor);
  }
  UpdateCost update_cost(const LinearSize&, int) const override { return {}; }
  at::Tensor merged(const std::string& module, const ModuleTensors& tensors, const at::Tensor& w_OI) const override {
    return method_.merged(module, tensors, w_OI);
  }

 private:
  const AdapterMethod& method_;
};

TEST(PlantedError, AnUpdateThatIsForgottenIsSeen) {
  const RunConfig config = run_of({.name = "lora"});
  TrainingRun run(&test_world(), 1, config.model, config.adapter);
  const StepShape step{.sequences = kSequences, .seq_len = kLength, .targets = 94, .element_bytes = 4};
  const Batch batch = full_batches(run.model->vocab_size(), 1).micro_batches[0];
  kept_bytes(run, batch);
  const auto plan = memory_of(outline_of(config, 1, test_world().size()), Forgetful(*run.method), step).activations;
  EXPECT_GT(static_cast<double>(kept_bytes(run, batch)) / static_cast<double>(plan), 1.02);
}

}  // namespace
}  // namespace corank::test
