#include <torch/csrc/autograd/autograd.h>

#include <fstream>

#include "data/weight_file.h"
#include "tests/golden_case.h"
#include "trainer/generation.h"

// Against values that transformers and PEFT computed (tests/golden/make_golden.py, make_families.py), float32 on the
// CPU. Bounds: methods 13.
namespace corank::test {
namespace {

using nlohmann::json;

std::string case_name(const testing::TestParamInfo<std::string>& param) {
  return param.param.substr(param.param.rfind('/') + 1);
}

ModelOptions model_at(const std::string& path, at::ScalarType dtype = at::kFloat) {
  ModelOptions options;
  options.path = path;
  options.dtype = dtype;
  options.max_positions = 64;
  return options;
}

class LoraGolden : public testing::TestWithParam<std::string> {
 protected:
  LoraGolden() : golden_(GetParam()), adapter_(read_adapter(golden_.path("adapter"))) {}

  std::unique_ptr<TrainingRun> start(OptimizerOptions optimizer = {}, at::ScalarType dtype = at::kFloat) {
    const ModelOptions options = model_at(golden_.path("model"), dtype);
    auto run = std::make_unique<TrainingRun>(nullptr, 1, options, adapter_.config, optimizer);
    load_tensors(adapter_, run->store);
    return run;
  }

  Golden golden_;
  AdapterFile adapter_;
};

TEST_P(LoraGolden, LogitsMatch) {
  const auto run = start();
  for (const int64_t sample : {0, 1, 11}) {
    const at::Tensor logits = all_logits(*run->model, golden_.tokens(sample), run->mesh.tp());
    EXPECT_LT(relative_error(logits, golden_.value("logits." + std::to_string(sample))), 1e-5);
  }
}

TEST_P(LoraGolden, LossAndGradientsMatch) {
  const auto run = start();
  EXPECT_NEAR(accumulate(*run, golden_.batches()) / golden_.number("loss"), 1, 1e-6);
  for (const auto& p : run->store.parameters()) {
    EXPECT_LT(relative_error(p.gradient, golden_.value("grad." + p.spec.name)), 1e-4) << p.spec.name;
  }
  const double norm = gradient_norm(run->store, run->mesh.tp()).item<double>();
  EXPECT_NEAR(norm / golden_.number("grad_norm"), 1, 1e-5);
}

TEST_P(LoraGolden, ParametersAfterOneStepMatch) {
  OptimizerOptions optimizer;
  optimizer.weight_decay = 0.01;
  const auto run = start(optimizer);
  run->step(golden_.batches(), 1, 1e-3, /*max_grad_norm=*/0);
  for (const auto& p : run->store.parameters()) {
    EXPECT_LT(relative_error(p.master, golden_.value("after_1." + p.spec.name)), 1e-5) << p.spec.name;
  }
}

TEST_P(LoraGolden, TwentyStepsMatch) {
  OptimizerOptions optimizer;
  optimizer.weight_decay = 0.01;
  const auto run = start(optimizer);
  const Schedule schedule{"cosine", 1e-3, 3, 20};
  const at::Tensor losses = golden_.value("losses_20"), rates = golden_.value("learning_rates_20"),
                   norms = golden_.value("grad_norms_20");
  for (int64_t step = 1; step <= 20; ++step) {
    const double rate = lr_at(schedule, step);
    EXPECT_NEAR(rate, rates[step - 1].item<double>(), 1e-12);
    const StepStats stats = run->step(golden_.batches(), step, rate);
    EXPECT_NEAR(stats.loss / losses[step - 1].item<double>(), 1, 1e-4) << "step " << step;
    EXPECT_NEAR(stats.grad_norm / norms[step - 1].item<double>(), 1, 1e-3) << "step " << step;
  }
}

/// Base in bfloat16, adapter in float32, against the float32 reference (methods 13, right-hand column).
TEST_P(LoraGolden, BFloat16StaysNear) {
  OptimizerOptions optimizer;
  optimizer.weight_decay = 0.01;
  const auto run = start(optimizer, at::kBFloat16);
  EXPECT_LT(relative_error(all_logits(*run->model, golden_.tokens(1), run->mesh.tp()), golden_.value("logits.1")),
            2e-2);
  EXPECT_NEAR(accumulate(*run, golden_.batches()) / golden_.number("loss"), 1, 5e-3);
  const double norm = gradient_norm(run->store, run->mesh.tp()).item<double>();
  EXPECT_NEAR(norm / golden_.number("grad_norm"), 1, 3e-2);
  run->store.gradients().zero_();
  const at::Tensor losses = golden_.value("losses_20");
  for (int64_t step = 1; step <= 20; ++step) {
    const StepStats stats = run->step(golden_.batches(), step, lr_at({"cosine", 1e-3, 3, 20}, step));
    EXPECT_NEAR(stats.loss / losses[step - 1].item<double>(), 1, 2e-2) << "step " << step;
  }
}

/// The test of the test: a factor that forgets alpha / r must not pass the same comparison.
TEST_P(LoraGolden, WrongScalingIsSeen) {
  AdapterConfig wrong = adapter_.config;
  wrong.lora_alpha *= 1.01;
  TrainingRun run(nullptr, 1, model_at(golden_.path("model")), wrong);
  load_tensors(adapter_, run.store);
  EXPECT_GT(relative_error(all_logits(*run.model, golden_.tokens(1), run.mesh.tp()), golden_.value("logits.1")), 1e-5);
}

/// Token by token with a cache, against the whole sequence at once.
TEST_P(LoraGolden, GenerationTakesTheLikeliestToken) {
  const auto run = start();
  std::vector<int64_t> tokens = golden_.tokens(1);
  tokens.resize(6);
  GenerationOptions options;
  options.max_new_tokens = 18;
  for (const int64_t next : generate(*run->model, tokens, options, run->mesh.tp())) {
    const at::Tensor logits_TV = all_logits(*run->model, tokens, run->mesh.tp());
    EXPECT_EQ(next, logits_TV[-1].argmax().item<int64_t>()) << "after " << tokens.size() << " tokens";
    tokens.push_back(next);
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, LoraGolden, testing::Values("llama", "llama_tied_llama3rope", "llama_biased_headdim"),
                         case_name);
INSTANTIATE_TEST_SUITE_P(Families, LoraGolden, testing::ValuesIn(family_cases()), case_name);

class FullGolden : public testing::TestWithParam<std::string> {
 protected:
  FullGolden() : golden_(GetParam()), full_(golden_.path("full.safetensors")) {}

  std::unique_ptr<TrainingRun> start() {
    AdapterConfig config;
    config.method = "full";
    return std::make_unique<TrainingRun>(nullptr, 1, model_at(golden_.path("model")), config);
  }

  Golden golden_;
  SafetensorsFile full_;
};

TEST_P(FullGolden, LossAndEveryGradientMatch) {
  const auto run = start();
  EXPECT_NEAR(accumulate(*run, golden_.batches()) / full_.read("full.loss").item<double>(), 1, 1e-6);
  const auto transposed = transposed_weights(*run->model);
  int64_t compared = 0;
  for (const auto& entry : full_.tensors()) {
    if (!entry.first.starts_with("full.grad.")) continue;
    const std::string name = entry.first.substr(10);
    const at::Tensor theirs = full_.read(entry.first), ours = run->store.at(name).gradient;
    EXPECT_LT(relative_error(transposed.count(name) ? ours.t() : ours, theirs), 1e-4) << name;
    ++compared;
  }
  EXPECT_EQ(compared, static_cast<int64_t>(run->store.parameters().size()));
}

TEST_P(FullGolden, TwentyStepsMatch) {
  const auto run = start();
  const at::Tensor losses = full_.read("full.losses_20");
  for (int64_t step = 1; step <= 20; ++step) {
    const StepStats stats = run->step(golden_.batches(), step, 1e-4, /*max_grad_norm=*/0);
    EXPECT_NEAR(stats.loss / losses[step - 1].item<double>(), 1, 1e-4) << "step " << step;
  }
}

/// The model's names and the file's are the same, each once.
TEST_P(FullGolden, EveryTensorOfTheFileHasItsName) {
  const auto run = start();
  std::vector<std::string> names;
  for (const auto& p : run->store.parameters()) names.push_back(p.spec.name);
  std::sort(names.begin(), names.end());
  EXPECT_EQ(names, WeightFile(golden_.path("model")).names());
}

INSTANTIATE_TEST_SUITE_P(Cases, FullGolden, testing::Values("llama_biased_headdim"), case_name);
INSTANTIATE_TEST_SUITE_P(Families, FullGolden, testing::ValuesIn(family_cases()), case_name);

/// The folder of "gpt2" itself has names without "transformer.", and the causal masks.
TEST(Gpt2, AFolderOfTheBareModelIsTheSameModel) {
  const Golden gpt2("families/gpt2");
  const TemporaryFolder folder;
  WeightFile weights(gpt2.path("model"));
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const std::string& name : weights.names()) tensors.emplace_back(name.substr(12), weights.read(name));
  for (const char* layer : {"h.0", "h.1"}) {
    tensors.emplace_back(std::string(layer) + ".attn.bias", at::ones({1, 1, 64, 64}).tril());
  }
  write_file_atomically(folder.path("model.safetensors"), safetensors_image(tensors));
  write_file_atomically(folder.path("config.json"), read_file(gpt2.path("model/config.json")));
  Ledger ledger;
  const auto solo = make_solo_communicator(at::kCPU, ledger);
  const auto bare = load_model(model_at(folder.path()), *solo), whole = load_model(model_at(gpt2.path("model")), *solo);
  EXPECT_TRUE(at::equal(all_logits(*bare, gpt2.tokens(1), *solo), all_logits(*whole, gpt2.tokens(1), *solo)));
}

TEST(TargetModules, MatchPeft) {
  std::vector<std::string> linears;
  {
    Ledger ledger;
    const auto solo = make_solo_communicator(at::kCPU, ledger);
    const auto model = outline_model(model_at(golden("llama/model")), *solo);
    for (const AdaptedLinear* linear : model->linears()) linears.push_back(linear->name());
  }
  int64_t settings = 0;
  for (const auto& setting : nlohmann::ordered_json::parse(read_file(golden("peft_targets.json")))) {
    const std::string title = setting["title"].get<std::string>();
    const auto& config = setting["config"];
    if (config.contains("layers_to_transform") || config.contains("layers_pattern"))
      continue;  // no key of the run file
    if (config.contains("bias") || config.contains("use_dora") || config.contains("modules_to_save")) continue;
    if (!config.contains("target_modules") || config["target_modules"].is_null()) continue;
    SCOPED_TRACE(title);
    auto text = config;
    text["peft_type"] = "LORA";
    const auto parse = [&] {
      AdapterConfig parsed = parse_peft_config(text.dump(), title);
      if (parsed.target_modules.expression == "all-linear" || parsed.target_modules.expression == "ALL-LINEAR")
        parsed.all_linear = true;
      return parsed;
    };
    if (!setting.contains("modules") || title == "the head") {  // the head takes no adapter here: refused, not ignored
      EXPECT_THROW(select_targets(parse(), linears), Error);
    } else {
      const AdapterConfig parsed = parse();
      std::vector<std::string> expected, found = select_targets(parsed, linears);
      for (const auto& module : setting["modules"]) {
        const std::string name = module["name"].get<std::string>();
        expected.push_back(name);
        EXPECT_EQ(parsed.rank_of(name), module["r"].get<int64_t>()) << name;
        EXPECT_EQ(parsed.alpha_of(name), module["alpha"].get<double>()) << name;
        EXPECT_DOUBLE_EQ(parsed.scaling_of(name), module["scaling"].get<double>()) << name;
      }
      std::sort(found.begin(), found.end());
      EXPECT_EQ(found, expected);
    }
    ++settings;
  }
  EXPECT_GT(settings, 30);
}

}  // namespace
}  // namespace corank::test
