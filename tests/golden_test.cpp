#include <fmt/format.h>
#include <torch/csrc/autograd/autograd.h>

#include <fstream>

#include "data/storage.h"
#include "data/weight_file.h"
#include "tests/golden_case.h"
#include "trainer/files/adapter_file.h"
#include "trainer/files/peft_config.h"
#include "trainer/methods/mora_update.h"
#include "trainer/methods/rank_budget.h"
#include "trainer/methods/targets.h"
#include "trainer/run/generation.h"

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
  LoraGolden() : golden_(GetParam()), adapter_(read_adapter(golden_.path("adapter"))) {
    if (GetParam() == "methods/loraplus") adapter_.config.loraplus_lr_ratio = 16;  // not in PEFT's file
  }

  std::unique_ptr<TrainingRun> start(OptimizerOptions optimizer = {}, at::ScalarType dtype = at::kFloat) {
    const ModelOptions options = model_at(golden_.model(), dtype);
    return std::make_unique<TrainingRun>(nullptr, 1, options, adapter_.config, optimizer, 42, &adapter_);
  }

  Golden golden_;
  SavedAdapter adapter_;
};

TEST_P(LoraGolden, LogitsMatch) {
  const auto run = start();
  for (const int64_t sample : {0, 1, 11}) {
    if (!golden_.has("logits." + std::to_string(sample))) continue;
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
  const double norm = gradient_norm(run->store, run->mesh).item<double>();
  EXPECT_NEAR(norm / golden_.number("grad_norm"), 1, 1e-5);
}

TEST_P(LoraGolden, ParametersAfterOneStepMatch) {
  OptimizerOptions optimizer;
  optimizer.weight_decay = 0.01;
  const auto run = start(optimizer);
  run->step(golden_.batches(), 1, 1e-3, /*max_grad_norm=*/0);
  for (const auto& p : run->store.parameters()) {
    // Adam's first step divides a gradient by itself: rounding shows where it is near 0, as in many places of a norm's.
    const double bound = p.spec.name.ends_with("norm.weight") ? 2e-5 : 1e-5;
    EXPECT_LT(relative_error(p.master, golden_.value("after_1." + p.spec.name)), bound) << p.spec.name;
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
  EXPECT_LT(relative_error(all_logits(*run->model, golden_.tokens(0), run->mesh.tp()), golden_.value("logits.0")),
            2e-2);
  EXPECT_NEAR(accumulate(*run, golden_.batches()) / golden_.number("loss"), 1, 5e-3);
  const double norm = gradient_norm(run->store, run->mesh).item<double>();
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
  TrainingRun run(nullptr, 1, model_at(golden_.model()), wrong, {}, 42, &adapter_);
  EXPECT_GT(relative_error(all_logits(*run.model, golden_.tokens(0), run.mesh.tp()), golden_.value("logits.0")), 1e-5);
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

INSTANTIATE_TEST_SUITE_P(Cases, LoraGolden,
                         testing::Values("llama", "llama_tied_llama3rope", "llama_biased_headdim", "methods/dora",
                                         "methods/adalora", "methods/rslora", "methods/modules_to_save",
                                         "methods/loraplus"),
                         case_name);
INSTANTIATE_TEST_SUITE_P(Families, LoraGolden, testing::ValuesIn(family_cases()), case_name);

/// Which triplets of a module live: "0110...".
std::string alive(const at::Tensor& e_R1) {
  std::string text;
  for (int64_t i = 0; i < e_R1.size(0); ++i) text += e_R1[i].item<float>() != 0 ? '1' : '0';
  return text;
}

class AdaLoraGolden : public testing::Test {
 protected:
  Golden golden_{"methods/adalora"};
  SavedAdapter adapter_ = read_adapter(golden_.path("adapter"));
  json schedule_ = json::parse(read_file(golden_.path("schedule.json")));
};

TEST_F(AdaLoraGolden, RegularisedGradientsMatch) {
  TrainingRun run(nullptr, 1, model_at(golden_.model()), adapter_.config, {}, 42, &adapter_);
  accumulate(run, golden_.batches());
  run.method->add_gradients(1, run.mesh);
  for (const auto& p : run.store.parameters()) {
    EXPECT_LT(relative_error(p.gradient, golden_.value("grad_regularised." + p.spec.name)), 1e-4) << p.spec.name;
  }
}

TEST_F(AdaLoraGolden, MasksOfEveryStepAndTheFolderAtTheEndAreThoseOfPeft) {
  OptimizerOptions optimizer;
  optimizer.weight_decay = 0.01;
  TrainingRun run(nullptr, 1, model_at(golden_.model()), adapter_.config, optimizer, 42, &adapter_);
  const Schedule schedule{"cosine", 1e-3, 3, 20};
  for (int64_t step = 1; step <= 20; ++step) {
    run.step(golden_.batches(), step, lr_at(schedule, step));
    const json& expected = schedule_["steps"][step - 1];
    EXPECT_EQ(budget_at(adapter_.config.options.get<AdaLoraConfig>(), 14, step), expected["budget"].get<int64_t>())
        << "step " << step;
    for (size_t m = 0; m < schedule_["modules"].size(); ++m) {
      const auto name = "base_model.model." + schedule_["modules"][m].get<std::string>() + ".lora_E";
      EXPECT_EQ(alive(run.store.at(name).master), expected["kept"][m].get<std::string>()) << name << " step " << step;
    }
  }
  SavedAdapter result{adapter_.config, "", run.store.gather(run.store.masters(), run.mesh.tp())};
  run.method->to_peft(result);
  const SavedAdapter final = read_adapter(golden_.path("adapter_final"));
  EXPECT_EQ(result.config.options.get<AdaLoraConfig>().kept_ranks,
            final.config.options.get<AdaLoraConfig>().kept_ranks);
  const std::map<std::string, at::Tensor> tensors(result.tensors.begin(), result.tensors.end());
  for (const auto& [name, tensor] : final.tensors) EXPECT_LT(relative_error(tensors.at(name), tensor), 1e-4) << name;
  TrainingRun again(nullptr, 1, model_at(golden_.model()), final.config, {}, 42, &final);
  EXPECT_LT(
      relative_error(all_logits(*again.model, golden_.tokens(0), again.mesh.tp()), golden_.value("final.logits.0")),
      1e-5);
}

/// PEFT's allocator alone over 50 steps, fed with values of a closed formula (make_methods.py).
class Allocator : public testing::TestWithParam<std::string> {
 protected:
  static at::Tensor by_formula(std::vector<int64_t> shape, int64_t number, double c) {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    const at::Tensor i = at::arange(count, at::TensorOptions(at::kLong));
    return (((i * 7919 + number * 104729).remainder(2003) - 1001).to(at::kFloat) * c).view(shape);
  }
};

TEST_P(Allocator, BudgetsAndMasksAreThoseOfPeft) {
  const json trace = json::parse(read_file(golden("methods/" + GetParam())));
  const json& c = trace["config"];
  AdaLoraConfig config;
  config.init_r = c["init_r"], config.target_r = c["target_r"], config.total_step = c["total_step"];
  config.beta1 = c["beta1"], config.beta2 = c["beta2"];
  config.tinit = c["tinit"], config.tfinal = c["tfinal"], config.deltaT = c["deltaT"];
  const std::vector<std::pair<int64_t, int64_t>> sizes{{20, 28}, {32, 12}, {16, 40}};
  std::map<int64_t, std::pair<at::Tensor, at::Tensor>> averages;  // by tensor number
  at::Tensor kept;
  for (const json& expected : trace["steps"]) {
    const int64_t step = expected["step"];
    std::vector<at::Tensor> scores;
    for (int64_t module = 0; module < 3; ++module) {
      const auto [in, out] = sizes[module];
      const std::vector<std::vector<int64_t>> shapes{{6, in}, {out, 6}, {6, 1}};
      std::vector<at::Tensor> parts;
      for (int64_t n = 0; n < 3; ++n) {
        const at::Tensor p = by_formula(shapes[n], 1001 + 20 * step + 3 * module + n, 1.0 / 1024);
        const at::Tensor g = by_formula(shapes[n], 50000 + 20 * step + 3 * module + n, 1.0 / 4096);
        auto& [importance, uncertainty] = averages[3 * module + n];
        if (!importance.defined()) importance = at::zeros_like(p), uncertainty = at::zeros_like(p);
        if (follows_importance(config, step)) update_importance(importance, uncertainty, p, g, config);
        parts.push_back(importance * uncertainty);
      }
      scores.push_back(parts[2].view({-1}) + parts[0].mean(1) + parts[1].mean(0));
    }
    EXPECT_EQ(budget_at(config, 3, step), expected["budget"].get<int64_t>()) << "step " << step;
    const Masking masking = masking_at(config, step);
    EXPECT_EQ(masking != Masking::none, expected.contains("kept")) << "step " << step;
    if (masking == Masking::none) continue;
    if (masking == Masking::choose) kept = kept_triplets(at::stack(scores), budget_at(config, 3, step));
    for (int64_t module = 0; module < 3; ++module) {
      EXPECT_EQ(alive(kept[module].to(at::kFloat)), expected["kept"][module].get<std::string>()) << "step " << step;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Traces, Allocator, testing::Values("allocator_0.json", "allocator_1.json"));

class PissaGolden : public testing::Test {
 protected:
  PissaGolden() {
    adapter_.config.method = "pissa";
    adapter_.config.r = 4;
    adapter_.config.lora_alpha = 8;
    const SafetensorsFile file(golden_.path("adapter/adapter_model.safetensors"));
    for (const auto& entry : file.tensors()) adapter_.tensors.emplace_back(entry.first, file.read(entry.first));
  }

  /// A run that started at PEFT's own first factors: its float32 decomposition is 8e-6 off the exact one, which the
  /// logits would show.
  std::unique_ptr<TrainingRun> start(OptimizerOptions optimizer = {}) {
    auto run =
        std::make_unique<TrainingRun>(nullptr, 1, model_at(golden_.model()), adapter_.config, optimizer, 42, &adapter_);
    const SafetensorsFile first(golden_.path("adapter_init/adapter_model.safetensors"));
    const at::Tensor initial = run->method->state()[0].second;
    for (const auto& p : run->store.parameters()) {
      initial.narrow(0, p.begin, p.master.numel()).view(p.master.sizes()).copy_(first.read(p.spec.name));
    }
    run->method->begin(run->mesh);
    return run;
  }

  Golden golden_{"methods/pissa"};
  SavedAdapter adapter_;
};

/// Signs of singular vectors are free: products are compared, never factors.
TEST_F(PissaGolden, FirstFactorsAndResidualsAreThoseOfPeft) {
  TrainingRun run(nullptr, 1, model_at(golden_.model()), adapter_.config);
  const SafetensorsFile expected(golden_.path("init.safetensors"));
  int64_t compared = 0;
  for (const AdaptedLinear* linear : run.model->linears()) {
    const std::string module = linear->name().substr(std::string("model.").size());
    if (!expected.tensors().count("product." + module)) continue;
    const auto factor = [&](const char* suffix) {
      return run.store.at("base_model.model." + linear->name() + suffix).master;
    };
    const at::Tensor product = at::mm(factor(".lora_B.weight"), factor(".lora_A.weight")) * 2;
    const at::Tensor residual = linear->weight().dense_OI();
    EXPECT_LT(relative_error(product, expected.read("product." + module)), 1e-5) << linear->name();
    EXPECT_LT(relative_error(residual, expected.read("residual." + module)), 1e-5) << linear->name();
    EXPECT_LT(relative_error(product + residual, linear->read_base()), 1e-6) << linear->name();
    ++compared;
  }
  EXPECT_EQ(compared, 3);
}

TEST_F(PissaGolden, LossGradientsAndTwentyStepsMatch) {
  OptimizerOptions optimizer;
  optimizer.weight_decay = 0.01;
  const auto started = start(optimizer);
  TrainingRun& run = *started;
  EXPECT_LT(relative_error(all_logits(*run.model, golden_.tokens(0), run.mesh.tp()), golden_.value("logits.0")), 1e-5);
  EXPECT_NEAR(accumulate(run, golden_.batches()) / golden_.number("loss"), 1, 1e-6);
  for (const auto& p : run.store.parameters()) {
    EXPECT_LT(relative_error(p.gradient, golden_.value("grad." + p.spec.name)), 1e-4) << p.spec.name;
  }
  run.store.gradients().zero_();
  const at::Tensor losses = golden_.value("losses_20");
  for (int64_t step = 1; step <= 20; ++step) {
    const StepStats stats = run.step(golden_.batches(), step, lr_at({"cosine", 1e-3, 3, 20}, step));
    EXPECT_NEAR(stats.loss / losses[step - 1].item<double>(), 1, 1e-4) << "step " << step;
  }
}

/// On the original base, with twice the rank.
TEST_F(PissaGolden, ConversionToPlainLoraMatches) {
  const auto started = start();
  TrainingRun& run = *started;
  SavedAdapter file = adapter_;
  for (auto& entry : run.method->extra_tensors(run.mesh.tp())) file.tensors.push_back(entry);
  run.method->to_peft(file);
  EXPECT_EQ(file.config.method, "lora");
  EXPECT_EQ(file.config.r, 8);
  EXPECT_EQ(file.config.lora_alpha, 16);
  TrainingRun plain(nullptr, 1, model_at(golden_.model()), file.config, {}, 42, &file);
  const at::Tensor logits = all_logits(*plain.model, golden_.tokens(0), plain.mesh.tp());
  EXPECT_LT(relative_error(logits, golden_.value("lora.logits.0")), 1e-5);
  EXPECT_LT(relative_error(logits, golden_.value("logits.0")), 1e-5);
}

/// The authors' fork of PEFT, run in double precision (make_methods.py), with W = 0.
TEST(MoraGolden, OutputsAndGradientsOfEveryTypeAndShape) {
  const json sides = json::parse(read_file(golden("methods/mora.json")));
  const SafetensorsFile file(golden("methods/mora.safetensors"));
  const auto value = [&](const std::string& name) { return file.read(name).to(at::kDouble); };
  using enum ops::Grouping;
  const std::map<int64_t, std::pair<ops::Grouping, ops::Grouping>> types{
      {1, {modulo, modulo}}, {2, {block, block}}, {3, {block, modulo}}, {4, {modulo, block}}, {6, {rotate, rotate}}};
  for (const auto& [shape, ranks] : sides.items()) {
    const at::Tensor x = value(shape + ".x"), g = value(shape + ".g");
    const int64_t in = x.size(1), out = g.size(1);
    const DenseMatrix w(at::zeros({out, in}, at::kDouble));
    for (const auto& [r, side] : ranks.items()) {
      for (const auto& [type, grouping] : types) {
        const std::string name = fmt::format("{}.type{}.{}", shape, type, r);
        SCOPED_TRACE(name);
        const int64_t size = side[type == 6 ? "rotation" : "sharing"].get<int64_t>();
        const at::Tensor m = value(shape + ".M").narrow(0, 0, size).narrow(1, 0, size).contiguous();
        const ops::Rotation turn = ops::rotation_of(m.size(0), in, out, m.options().requires_grad(false));
        const MoraUpdate update({{m, m}, grouping.first, grouping.second, {in, 0, in}, {out, 0, out}, {}, turn});
        std::vector<at::Tensor> saved;
        const at::Tensor dx = at::empty_like(x);
        const double bound = type == 6 ? 1e-5 : 2e-6;
        EXPECT_LT(relative_error(update.forward(x, w, {}, saved), value(name + ".y")), bound);
        update.backward(g, x, w, saved, {dx, Write::over});
        EXPECT_LT(relative_error(m.grad(), value(name + ".dM")), bound);
        EXPECT_LT(relative_error(dx, value(name + ".dx")), bound);
        if (!file.tensors().count(name + ".delta")) continue;
        const at::Tensor delta = ops::mora_delta(m, grouping.first, grouping.second, in, out);
        EXPECT_LT(relative_error(delta, value(name + ".delta")), bound);
      }
    }
  }
}

class FullGolden : public testing::TestWithParam<std::string> {
 protected:
  FullGolden() : golden_(GetParam()), full_(golden_.path("full.safetensors")) {}

  std::unique_ptr<TrainingRun> start() {
    AdapterConfig config;
    config.method = "full";
    return std::make_unique<TrainingRun>(nullptr, 1, model_at(golden_.model()), config);
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
  DiskStorage().write_file(folder.path("model.safetensors"), safetensors_image(tensors));
  DiskStorage().write_file(folder.path("config.json"), read_file(gpt2.path("model/config.json")));
  Ledger ledger;
  const auto solo = make_solo_communicator(at::kCPU, ledger);
  const auto bare = load_model(model_at(folder.path()), *solo), whole = load_model(model_at(gpt2.path("model")), *solo);
  EXPECT_TRUE(at::equal(all_logits(*bare, gpt2.tokens(1), *solo), all_logits(*whole, gpt2.tokens(1), *solo)));
}

TEST(TargetModules, MatchPeft) {
  ModuleNames modules;
  {
    Ledger ledger;
    const auto solo = make_solo_communicator(at::kCPU, ledger);
    modules = module_names(*outline_model(model_at(golden("llama/model")), *solo));
  }
  const auto targets = [&](const AdapterConfig& config) {
    require_only_linears(config, modules.others);
    return select_targets(config, modules.linears);
  };
  int64_t settings = 0;
  for (const auto& setting : nlohmann::ordered_json::parse(read_file(golden("peft_targets.json")))) {
    const std::string title = setting["title"].get<std::string>();
    const auto& config = setting["config"];
    if (!config.contains("target_modules") || config["target_modules"].is_null()) continue;
    SCOPED_TRACE(title);
    auto text = config;
    text["peft_type"] = "LORA";
    const auto parse = [&] { return parse_peft_config(text.dump(), title, modules.linears); };
    if (!setting.contains("modules") || title == "the head") {  // the head takes no adapter here: refused, not ignored
      EXPECT_THROW(targets(parse()), Error);
    } else {
      const AdapterConfig parsed = parse();
      std::vector<std::string> expected, found = targets(parsed);
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
  EXPECT_GT(settings, 40);
}

}  // namespace
}  // namespace corank::test
