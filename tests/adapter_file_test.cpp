#include "trainer/files/adapter_file.h"

#include <fmt/format.h>

#include <filesystem>

#include "data/storage.h"
#include "tests/golden_case.h"
#include "trainer/files/check_adapter.h"
#include "trainer/files/combine.h"
#include "trainer/files/peft_config.h"
#include "trainer/files/plain_lora.h"
#include "trainer/files/saved_along.h"
#include "trainer/methods/mora.h"
#include "trainer/run/checkpoint.h"
#include "trainer/run/generation.h"

// Adapters as files: combined, and turned into plain LoRA, against PEFT's results and against merged weights.
namespace corank::test {
namespace {

using nlohmann::json;

ModelOptions llama() {
  ModelOptions options;
  options.path = golden("llama/model");
  options.dtype = at::kFloat;
  options.max_positions = 64;
  return options;
}

at::Tensor logits_of(const SavedAdapter& file, const std::vector<int64_t>& tokens) {
  TrainingRun run(nullptr, 1, llama(), file.config, {}, 42, &file);
  return all_logits(*run.model, tokens, run.mesh.tp());
}

BaseWeights llama_weights() {
  const auto reader = std::make_shared<LinearReader>(golden("llama/model"));
  return [reader](const std::string& module) { return reader->read(module); };
}

/// What the adapter adds to the weight of `module`.
at::Tensor update(const SavedAdapter& file, const std::string& module) {
  const at::Tensor w_OI = llama_weights()(module).to(at::kDouble);
  return make_method(file.config)->merged(module, module_tensors(file.tensors, module, at::kDouble), w_OI) - w_OI;
}

template <class Error>
void expect_refused(const std::function<void()>& work, const std::vector<std::string>& words) {
  try {
    work();
    ADD_FAILURE() << "accepted, expected: " << words[0];
  } catch (const Error& error) {
    for (const std::string& word : words) {
      EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << word << " not in: " << error.what();
    }
  }
}

// ---- combine

SavedAdapter combine_input(const std::string& name) { return read_adapter(golden("methods/combine/" + name)); }

std::vector<WeightedAdapter> weighted(const std::vector<std::string>& names, const std::vector<double>& weights) {
  std::vector<WeightedAdapter> adapters;
  for (size_t i = 0; i < names.size(); ++i) adapters.push_back({names[i], combine_input(names[i]), weights[i]});
  return adapters;
}

class Combine : public testing::TestWithParam<std::string> {
 protected:
  SavedAdapter combined(double off = 1) const {
    std::vector<double> weights = case_["weights"].get<std::vector<double>>();
    weights[0] *= off;
    std::optional<int64_t> rank;
    if (!case_["svd_rank"].is_null()) rank = case_["svd_rank"].get<int64_t>();
    return combine(weighted(case_["adapters"].get<std::vector<std::string>>(), weights), how_, rank);
  }

  json case_ = json::parse(read_file(golden("methods/combine/cases.json")))[GetParam()];
  std::string how_ = case_["combination_type"].get<std::string>();
  SavedAdapter peft_ = combine_input(GetParam());
};

TEST_P(Combine, ModulesAndRankAreThoseOfPeft) {
  const SavedAdapter ours = combined();
  check_adapter(ours, "combined");
  std::vector<std::string> modules = adapted_modules(ours), expected = adapted_modules(peft_);
  std::sort(modules.begin(), modules.end());
  std::sort(expected.begin(), expected.end());
  EXPECT_EQ(modules, expected);
  EXPECT_EQ(ours.config.r, peft_.config.r);
  EXPECT_EQ(ours.config.lora_alpha, peft_.config.lora_alpha);
  EXPECT_FALSE(ours.config.use_rslora);
  EXPECT_TRUE(make_method(ours.config)->beyond_plain_lora().empty());
}

/// Signs of singular vectors are free: of them magnitudes are compared.
TEST_P(Combine, FactorsAreThoseOfPeft) {
  if (GetParam() == "single_svd") return;  // PEFT takes linear for one adapter, whatever was asked
  const bool signs = how_ != "svd";
  const SavedAdapter ours = combined();
  const std::map<std::string, at::Tensor> theirs(peft_.tensors.begin(), peft_.tensors.end());
  for (const auto& [name, tensor] : ours.tensors) {
    const at::Tensor expected = theirs.at(name);
    EXPECT_LT(relative_error(signs ? tensor : tensor.abs(), signs ? expected : expected.abs()), signs ? 1e-6 : 1e-4)
        << name;
  }
}

TEST_P(Combine, UpdatesAreThoseOfPeft) {
  const SavedAdapter ours = combined(), other = combined(1.01);
  const SafetensorsFile products(golden("methods/combine/products.safetensors"));
  int64_t compared = 0;
  for (const auto& entry : products.tensors()) {
    if (!entry.first.starts_with(GetParam() + ".layers.")) continue;
    const std::string module = "model." + entry.first.substr(GetParam().size() + 1);
    // PEFT keeps the first adapter's use_rslora, and with it a scaling that nobody asked for.
    const double scaling = case_["scaling"][module].get<double>();
    const at::Tensor expected = products.read(entry.first).to(at::kDouble) / scaling;
    EXPECT_LT(relative_error(update(ours, module), expected), 1e-6) << module;
    EXPECT_GT(relative_error(update(other, module), expected), 1e-4) << "a weight that is 1 % off was not seen";
    ++compared;
  }
  EXPECT_EQ(compared, 2);
}

INSTANTIATE_TEST_SUITE_P(Cases, Combine,
                         testing::Values("linear", "cat", "svd", "svd_rank_3", "single_svd", "linear_rslora"),
                         [](const auto& param) { return param.param; });

TEST(CombineWays, CatIsTheWeightedSumAndSvdItsLeadingPart) {
  const std::vector<std::string> names{"first", "rslora_first", "third"};
  const std::vector<double> weights{0.7, -0.4, 1.5};
  const std::string module = "model.layers.1.self_attn.v_proj";
  at::Tensor sum = at::zeros({1}, at::kDouble);
  for (size_t i = 0; i < names.size(); ++i) sum = sum + update(combine_input(names[i]), module) * weights[i];
  const SavedAdapter cat = combine(weighted(names, weights), "cat", {});
  EXPECT_EQ(cat.config.r, 10);
  EXPECT_LT(relative_error(update(cat, module), sum), 1e-6);
  EXPECT_LT(relative_error(update(combine(weighted(names, weights), "svd", 10), module), sum), 1e-6);
  const at::Tensor s_R = at::linalg_svdvals(sum);
  const double best =
      (at::linalg_vector_norm(s_R.narrow(0, 5, s_R.size(0) - 5)) / at::linalg_vector_norm(s_R)).item<double>();
  const SavedAdapter cut = combine(weighted(names, weights), "svd", 5);
  EXPECT_EQ(cut.config.r, 5);
  EXPECT_NEAR(relative_error(update(cut, module), sum), best, 1e-6);
}

TEST(CombineRefuses, WhatCannotBeCombined) {
  const auto refused = [](const std::string& name, const std::vector<std::string>& words) {
    const WeightedAdapter other{"other", read_adapter(golden("methods/" + name + "/adapter")), 1};
    std::vector<WeightedAdapter> adapters = weighted({"first"}, {1});
    adapters.push_back(other);
    expect_refused<ConfigError>([&] { combine(adapters, "cat", {}); }, words);
  };
  refused("dora", {"other", "dora", "export --as plain-lora"});
  refused("adalora", {"other", "adalora", "export --as plain-lora"});
  refused("modules_to_save", {"other", "lm_head, model.norm", "modules_to_save"});
  const auto combined = [](const std::string& how, std::optional<int64_t> rank) {
    combine(weighted({"first", "third"}, {1, 1}), how, rank);
  };
  expect_refused<ConfigError>([&] { combined("linear", {}); },
                              {"q_proj", "rank 4 in first", "2 in third", "cat or svd"});
  expect_refused<ConfigError>([&] { combined("cat", 4); }, {"--r", "cat"});
  expect_refused<ConfigError>([&] { combined("ties", {}); }, {"'ties'", "linear, cat, svd"});
  std::vector<WeightedAdapter> sizes = weighted({"first", "second"}, {1, 1});
  for (auto& [name, tensor] : sizes[1].file.tensors) {
    if (name.ends_with("lora_A.weight")) tensor = tensor.narrow(1, 0, 32);
  }
  expect_refused<InputError>([&] { combine(sizes, "cat", {}); },
                             {"q_proj", "[64, 64] for first", "[64, 32] for second"});
}

// ---- plain LoRA

std::string fitting(const PlainLora& plain) { return make_method(plain.file.config)->beyond_plain_lora(); }

TEST(PlainLora, WhatIsPlainStaysAsItIs) {
  const SavedAdapter file = combine_input("first");
  const PlainLora plain = to_plain_lora(file, {});
  ASSERT_EQ(plain.file.tensors.size(), file.tensors.size());
  for (size_t i = 0; i < file.tensors.size(); ++i) {
    EXPECT_TRUE(at::equal(plain.file.tensors[i].second, file.tensors[i].second));
  }
  EXPECT_EQ(plain.file.config.lora_alpha, file.config.lora_alpha);
}

/// rsLoRA with a rank_pattern; AdaLoRA before and after its ranks were chosen.
TEST(PlainLora, ExactConversionsHaveTheSameLogits) {
  for (const auto& [folder, reference, logits] :
       {std::tuple{"methods/rslora/adapter", "methods/rslora", "logits.0"},
        std::tuple{"methods/adalora/adapter", "methods/adalora", "logits.0"},
        std::tuple{"methods/adalora/adapter_final", "methods/adalora", "final.logits.0"}}) {
    SCOPED_TRACE(folder);
    const SavedAdapter file = read_adapter(golden(folder));
    const PlainLora plain = to_plain_lora(file, {});
    EXPECT_EQ(fitting(plain), "");
    EXPECT_TRUE(plain.errors.empty());
    const Golden expected(reference);
    EXPECT_LT(relative_error(logits_of(plain.file, expected.tokens(0)), expected.value(logits)), 1e-5);
    EXPECT_LT(relative_error(logits_of(plain.file, expected.tokens(0)), logits_of(file, expected.tokens(0))), 2e-6);
    for (const std::string& module : adapted_modules(plain.file)) {
      EXPECT_LT(relative_error(update(plain.file, module), update(file, module)), 1e-6) << module;
    }
    SavedAdapter wrong = plain.file;
    wrong.config.lora_alpha *= 1.01;
    EXPECT_GT(relative_error(logits_of(wrong, expected.tokens(0)), expected.value(logits)), 1e-5);
  }
}

/// As a checkpoint has it (all ranks, some masked) and as PEFT's folders have it (only what lives).
TEST(PlainLora, ModulesWithoutRanksAreLeftOutAndTheRestNamedInFull) {
  SavedAdapter masked = read_adapter(golden("methods/adalora/adapter"));
  const std::string dead = "model.layers.0.mlp.down_proj";
  std::vector<std::string> alive = adapted_modules(masked);
  std::erase(alive, dead);
  std::sort(alive.begin(), alive.end());
  for (auto& [name, tensor] : masked.tensors) {
    if (!name.ends_with(".lora_E")) continue;
    tensor = tensor.clone();
    const int64_t lives = name.find(dead) == std::string::npos ? 4 : 0;
    tensor.narrow(0, lives, 6 - lives).zero_();
  }
  SavedAdapter pruned = masked;
  make_method(masked.config)->to_peft(pruned);
  for (const SavedAdapter& file : {masked, pruned}) {
    const PlainLora plain = to_plain_lora(file, {});
    EXPECT_EQ(plain.file.config.r, 4);
    const TemporaryFolder folder;
    DiskStorage disk;
    write_peft_folder(disk, folder.path("plain"), plain.file);
    const SavedAdapter back = read_adapter(folder.path("plain"));
    std::vector<std::string> named = back.config.target_modules.names, kept = adapted_modules(back);
    std::sort(named.begin(), named.end());
    std::sort(kept.begin(), kept.end());
    EXPECT_EQ(named, alive);
    EXPECT_EQ(kept, alive);
    for (const std::string& module : alive) {
      EXPECT_LT(relative_error(update(back, module), update(file, module)), 1e-6) << module;
    }
  }
}

TEST(PlainLora, AnUpdateOfZeroIsRefused) {
  SavedAdapter file = read_adapter(golden("methods/adalora/adapter"));
  for (auto& [name, tensor] : file.tensors) {
    if (name.ends_with("lora_E")) tensor = at::zeros_like(tensor);
  }
  expect_refused<InputError>([&] { to_plain_lora(file, {}); }, {"zero everywhere"});
}

TEST(PlainLora, RefusesWhatItCannotHoldOrDoesNotNeed) {
  const auto refused = [](const std::string& name, const PlainLoraOptions& options,
                          const std::vector<std::string>& words) {
    const SavedAdapter file = read_adapter(golden(name));
    expect_refused<ConfigError>([&] { to_plain_lora(file, options); }, words);
  };
  refused("methods/modules_to_save/adapter", {}, {"lm_head, model.norm", "modules_to_save", "--as peft"});
  refused("methods/dora/adapter", {}, {"--base", "dora"});
  PlainLoraOptions ranked;
  ranked.rank = 4;
  refused("methods/adalora/adapter", ranked, {"--r", "adalora", "exactly"});
  refused("methods/combine/first", ranked, {"--r", "lora", "exactly"});
}

/// A MoRA adapter of the model of tests/golden/llama whose matrices are not zero.
SavedAdapter mora(int64_t type) {
  AdapterConfig config;
  config.method = "mora";
  config.r = 2;
  config.options.edit<MoraConfig>().type = type;
  TrainingRun run(nullptr, 1, llama(), config);
  at::manual_seed(7);
  run.store.masters().copy_(at::randn_like(run.store.masters()) * 0.05);
  return {config, "", run.store.gather(run.store.masters(), run.mesh.tp())};
}

std::vector<std::pair<std::string, SavedAdapter>> decomposed() {
  return {{"dora", read_adapter(golden("methods/dora/adapter"))}, {"mora 1", mora(1)}, {"mora 6", mora(6)}};
}

TEST(PlainLoraBySvd, TheErrorsAreTheTrueOnes) {
  for (const auto& [name, file] : decomposed()) {
    SCOPED_TRACE(name);
    PlainLoraOptions options{{}, 1, llama_weights()};
    const PlainLora plain = to_plain_lora(file, options);
    EXPECT_EQ(plain.file.config.r, 2 * file.config.r);
    EXPECT_EQ(fitting(plain), "");
    ASSERT_EQ(plain.errors.size(), adapted_modules(file).size());
    for (const auto& [module, error] : plain.errors) {
      const at::Tensor exact = update(file, module);
      EXPECT_NEAR(relative_error(update(plain.file, module), exact) / error, 1, 1e-6) << module;
      const at::Tensor s_R = at::linalg_svdvals(exact);
      const int64_t rest = s_R.size(0) - plain.file.config.r;
      const double best =
          (at::linalg_vector_norm(s_R.narrow(0, plain.file.config.r, rest)) / at::linalg_vector_norm(s_R))
              .item<double>();
      EXPECT_NEAR(error / best, 1, 1e-6) << module;
    }
  }
}

TEST(PlainLoraBySvd, AtFullRankTheLogitsAreTheSame) {
  const Golden reference("methods/dora");
  for (const auto& [name, file] : decomposed()) {
    SCOPED_TRACE(name);
    const PlainLora plain = to_plain_lora(file, {64, 1e-6, llama_weights()});
    EXPECT_LT(relative_error(logits_of(plain.file, reference.tokens(0)), logits_of(file, reference.tokens(0))), 2e-6);
  }
}

TEST(PlainLoraBySvd, AboveTheThresholdItNamesTheWorstModuleAndARankThatWillDo) {
  for (const auto& [name, file] : decomposed()) {
    SCOPED_TRACE(name);
    const PlainLora all = to_plain_lora(file, {4, 1, llama_weights()});
    const auto worst = *std::max_element(all.errors.begin(), all.errors.end(),
                                         [](const auto& a, const auto& b) { return a.second < b.second; });
    const double bound = worst.second / 2;
    std::string message;
    try {
      to_plain_lora(file, {4, bound, llama_weights()});
    } catch (const InputError& error) {
      message = error.what();
    }
    EXPECT_NE(message.find(worst.first), std::string::npos) << message;
    const size_t at = message.find("(--r ");
    ASSERT_NE(at, std::string::npos) << message;
    const int64_t rank = std::stoll(message.substr(at + 5));
    EXPECT_NO_THROW(to_plain_lora(file, {rank, bound, llama_weights()}));
    EXPECT_THROW(to_plain_lora(file, {rank - 1, bound, llama_weights()}), InputError);
  }
}

// ---- adapter_config.json of others

struct FieldCase {
  const char* field;
  std::vector<json> accepted, refused;
};

/// Every field of LoraConfig and AdaLoraConfig of PEFT 0.21, with values that PEFT itself can write.
const std::vector<FieldCase>& field_cases() {
  static const std::vector<FieldCase> cases{
      {"peft_type", {"LORA"}, {"IA3", "LOHA", "PROMPT_TUNING", "VERA", nullptr}},
      {"task_type", {"CAUSAL_LM", nullptr}, {"SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", 3}},
      {"auto_mapping", {nullptr, {{"base_model_class", "LlamaForCausalLM"}}}, {}},
      {"peft_version", {"0.21.0"}, {}},
      {"base_model_name_or_path", {nullptr, "some/model"}, {}},
      {"revision", {nullptr, "main"}, {}},
      {"inference_mode", {true, false}, {}},
      {"r", {1, 8}, {0, -1, 2.5, "8", nullptr, true, 1e300, uint64_t{1} << 63}},
      {"target_modules",
       {json{"q_proj"}, ".*q_proj", "all-linear", "ALL-LINEAR"},
       {nullptr, json::array(), 3, "(q_proj", json{1}, "", "(?x) .*q_proj"}},
      {"exclude_modules", {nullptr, json{"k_proj"}, ".*k_proj", ""}, {3, "(k_proj", R"(.*k_proj\z\z\K)"}},
      {"lora_alpha", {1, 8.5}, {0, "8", -1, nullptr, true, 1e300}},
      {"lora_dropout", {0.0, 0.5}, {1.0, -0.1, "0", nullptr}},
      {"fan_in_fan_out", {true, false}, {"no"}},
      {"bias", {"none"}, {"all", "lora_only", true, nullptr}},
      {"use_rslora", {true, false}, {"yes"}},
      {"modules_to_save", {nullptr, json::array(), json{"lm_head"}}, {"lm_head", 3, json{1}}},
      {"init_lora_weights",
       {true, false, nullptr, "gaussian", "Gaussian", "orthogonal", "eva", "mica"},
       {"pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga", "other", 3}},
      {"layers_to_transform", {nullptr, json::array(), 1, json{0, 1}}, {json{7}, "1", 0.5, -1, 1e300, true}},
      {"layers_pattern", {nullptr, json::array(), ""}, {"layers", json{"layers"}, 3}},
      {"rank_pattern",
       {json::object(), {{"q_proj", 4}}},
       {{{"q_proj", 0}}, {{"q_proj", "4"}}, json{4}, nullptr, {{"(q", 4}}, {{"q_proj", nullptr}}, {{"(?i)q_proj", 4}}}},
      {"alpha_pattern", {json::object(), {{"q_proj", 4.5}}}, {{{"q_proj", -1}}, {{"q_proj", "4"}}, json{4}, nullptr}},
      {"megatron_config", {nullptr}, {{{"hidden_size", 64}}}},
      {"megatron_core", {"megatron.core", nullptr}, {}},
      {"trainable_token_indices", {nullptr, json::array()}, {json{1, 2}, {{"embed_tokens", json{1}}}}},
      {"loftq_config", {json::object(), nullptr}, {}},
      {"eva_config", {nullptr, {{"rho", 2.0}}}, {}},
      {"corda_config", {nullptr, {{"corda_method", "ipm"}}}, {}},
      {"lora_ga_config", {nullptr, {{"direction", "ArB2r"}}}, {}},
      {"use_dora", {true, false}, {"yes"}},
      {"velora_config", {nullptr}, {{{"num_groups", 8}}}},
      {"alora_invocation_tokens", {nullptr}, {json{1, 2}}},
      {"use_qalora", {false}, {true}},
      {"qalora_group_size", {16, 32}, {}},
      {"monteclora_config", {nullptr}, {{{"monteclora_n", 8}}}},
      {"layer_replication", {nullptr, json::array()}, {json{{0, 2}, {1, 2}}}},
      {"lora_bias", {false}, {true}},
      {"target_parameters", {nullptr}, {json{"mlp.experts.gate_up_proj"}}},
      {"use_bdlora", {nullptr}, {{{"nblocks", 2}}}},
      {"arrow_config", {nullptr}, {{{"top_k", 3}}}},
      {"kasa_config", {nullptr}, {{{"beta", 1e-4}}}},
      {"ensure_weight_tying", {false}, {true}},
      {"use_mora", {true, false}, {"yes"}},
      {"mora_type", {1, 6}, {"6", 5, 0, nullptr}},
      {"merge_weights", {false}, {true}},  // PEFT 0.1
      {"use_something_new", {false, nullptr, json::array(), json::object(), ""}, {true, 1, "on", {{"a", 1}}}},
  };
  return cases;
}

const std::vector<FieldCase>& adalora_cases() {
  static const std::vector<FieldCase> cases{
      {"peft_type", {"ADALORA"}, {}},
      {"target_r", {8, 0}, {-1, 13, "8"}},
      {"init_r", {12}, {0, "12", nullptr}},
      {"tinit", {0, 5}, {-1, "0"}},
      {"tfinal", {0, 5}, {-1, "0"}},
      {"deltaT", {1, 10}, {0, "1"}},
      {"beta1", {0.85}, {1.0, "0", nullptr}},
      {"beta2", {0.85}, {0.0, "0"}},
      {"orth_reg_weight", {0.5, 0}, {-1, "0"}},
      {"total_step", {100}, {"100", 1.5}},
      {"rank_pattern",
       {nullptr, {{"model.layers.0.self_attn.q_proj.lora_E", json{true, false}}}},
       {{{"model.layers.0.self_attn.q_proj.lora_E", json{1, 0}}}, {{"q_proj", 4}}}},
      {"use_dora", {false}, {true}},
  };
  return cases;
}

void check_fields(const json& plain, const std::vector<FieldCase>& cases) {
  const std::vector<std::string> modules{"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
                                         "model.layers.1.self_attn.k_proj"};
  for (const FieldCase& field : cases) {
    for (const json& value : field.accepted) {
      SCOPED_TRACE(fmt::format("{} = {}", field.field, value.dump()));
      json config = plain;
      config[field.field] = value;
      EXPECT_NO_THROW(parse_peft_config(config.dump(), "adapter_config.json", modules));
    }
    for (const json& value : field.refused) {
      SCOPED_TRACE(fmt::format("{} = {}", field.field, value.dump()));
      json config = plain;
      config[field.field] = value;
      expect_refused<InputError>([&] { parse_peft_config(config.dump(), "adapter_config.json", modules); },
                                 {field.field, "adapter_config.json"});
    }
  }
}

TEST(PeftFields, EachIsHonouredIgnoredOrRefusedByName) {
  check_fields({{"peft_type", "LORA"}, {"target_modules", {"q_proj"}}}, field_cases());
  check_fields({{"peft_type", "ADALORA"}, {"target_modules", {"q_proj"}}, {"total_step", 10}}, adalora_cases());
}

TEST(PeftFields, TheTableIsThatOfPeft) {
  for (const char* folder : {"methods/combine/first", "methods/adalora/adapter"}) {
    const json written = json::parse(read_file(golden(std::string(folder) + "/adapter_config.json")));
    for (const auto& entry : written.items()) {
      const auto is_it = [&](const FieldCase& field) { return entry.key() == field.field; };
      EXPECT_TRUE(std::any_of(field_cases().begin(), field_cases().end(), is_it) ||
                  std::any_of(adalora_cases().begin(), adalora_cases().end(), is_it))
          << entry.key() << " of " << folder << " is not in the table";
    }
  }
}

TEST(PeftFields, TwoMethodsInOneFileAreRefused) {
  const json config{{"peft_type", "LORA"}, {"target_modules", {"q_proj"}}, {"use_dora", true}, {"use_mora", true}};
  expect_refused<InputError>([&] { parse_peft_config(config.dump(), "file", {}); }, {"use_dora", "use_mora"});
}

/// Whatever stands in a field, of any method: it is taken, or refused in one short message that names the file.
TEST(PeftFields, NoValueDoesMoreThanBeRefused) {
  const std::vector<std::string> modules{"model.layers.0.self_attn.q_proj",
                                         fmt::format("model.layers.{}.self_attn.q_proj", "1180591620717411303424")};
  json deep = 1;
  for (int i = 0; i < 25; ++i) deep = json{{"a", json::array({deep})}};
  const std::vector<json> values{nullptr,
                                 true,
                                 "",
                                 "text",
                                 std::string(100'000, 'x'),
                                 -1,
                                 0,
                                 1.5,
                                 1e300,
                                 uint64_t{1} << 63,
                                 json::array(),
                                 json{1},
                                 json{"x", 1},
                                 json{json{"x"}},
                                 json::object(),
                                 {{"a", 1}},
                                 {{"a", json{true}}},
                                 {{"", -1}},
                                 {{"a", {{"b", nullptr}}}},
                                 {{"(", 1}},
                                 deep};
  std::vector<std::string> fields;
  for (const auto* cases : {&field_cases(), &adalora_cases()}) {
    for (const FieldCase& field : *cases) fields.emplace_back(field.field);
  }
  int64_t taken = 0, refused = 0;
  for (const json& method :
       {json{{"peft_type", "LORA"}}, json{{"peft_type", "ADALORA"}}, json{{"peft_type", "LORA"}, {"use_dora", true}},
        json{{"peft_type", "LORA"}, {"use_mora", true}}, json{{"peft_type", "LORA"}, {"layers_to_transform", 0}}}) {
    for (const std::string& field : fields) {
      for (const json& value : values) {
        json config = method;
        config["target_modules"] = {"q_proj"};
        config[field] = value;
        try {
          parse_peft_config(config.dump(), "adapter_config.json", modules);
          ++taken;
        } catch (const InputError& error) {
          EXPECT_TRUE(std::string(error.what()).starts_with("adapter_config.json: ")) << error.what();
          EXPECT_LT(std::string(error.what()).size(), 500u) << error.what();
          ++refused;
        }
      }
    }
  }
  EXPECT_GT(taken, 500);
  EXPECT_GT(refused, 2000);
}

TEST(PeftFields, TextThatIsNoStrictJsonIsRefused) {
  const std::string good = R"({"peft_type": "LORA", "target_modules": ["q_proj"], "r": 8)";
  EXPECT_NO_THROW(parse_peft_config(good + "}", "file", {}));
  const std::string deep(300'000, '[');
  for (const auto& [text, word] :
       std::vector<std::pair<std::string, std::string>>{{good + R"(, "r": 16})", "twice"},
                                                        {good + "}" + std::string("\0", 1), "NUL"},
                                                        {good + "} x", "JSON"},
                                                        {"\xef\xbb\xbf" + good + "}", "byte order mark"},
                                                        {good + R"(, "loftq_config": )" + deep, "nested deeper"},
                                                        {good + R"(, "a": )" + std::string(300'000, '{'), "JSON"},
                                                        {good + ", \"revision\": \"\xff\"}", "JSON"},
                                                        {good + R"(, "lora_alpha": 1e999})", "JSON"},
                                                        {good + R"(, "lora_alpha": NaN})", "JSON"},
                                                        {"", "JSON"},
                                                        {"[]", "object"},
                                                        {"null", "object"}}) {
    expect_refused<InputError>([&] { parse_peft_config(text, "file", {}); }, {word, "file"});
  }
}

TEST(PeftFields, KeysOfPatternsAreBoundedInNumber) {
  json config{{"peft_type", "LORA"}, {"target_modules", {"q_proj"}}};
  for (int i = 0; i < 10'000; ++i) config["rank_pattern"][fmt::format("layers.{}.q_proj", i)] = 4;
  expect_refused<InputError>([&] { parse_peft_config(config.dump(), "file", {}); },
                             {"file: rank_pattern", "10000 keys"});
}

TEST(PeftFields, ALayerNumberBeyondEveryNumberIsNotListed) {
  const std::string huge = "model.layers.1180591620717411303424.self_attn.q_proj",
                    real = "model.layers.1.self_attn.q_proj";
  const json config{{"peft_type", "LORA"}, {"target_modules", {"q_proj"}}, {"layers_to_transform", {1}}};
  EXPECT_EQ(parse_peft_config(config.dump(), "file", {huge, real}).target_modules.names,
            std::vector<std::string>{real});
}

/// A copy of a folder of PEFT's, with other settings, without some tensors and with others.
void write_changed(const std::string& folder, const std::string& to, const json& changes, const std::string& without,
                   const NamedTensors& more = {}) {
  json config = json::parse(read_file(golden(folder + "/adapter_config.json")));
  config.update(changes);
  DiskStorage().make_folders(to);
  DiskStorage().write_file(to + "/adapter_config.json", config.dump());
  const SafetensorsFile file(golden(folder + "/adapter_model.safetensors"));
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const auto& entry : file.tensors()) {
    if (entry.first.find(without) == std::string::npos) tensors.emplace_back(entry.first, file.read(entry.first));
  }
  tensors.insert(tensors.end(), more.begin(), more.end());
  DiskStorage().write_file(to + "/adapter_model.safetensors", safetensors_image(tensors));
}

TEST(PeftFields, LayersToTransformIsResolved) {
  const TemporaryFolder folder;
  write_changed("methods/combine/first", folder.path("a"), {{"layers_to_transform", {1, 7}}}, "layers.0.");
  const SavedAdapter file = read_adapter(folder.path("a"));
  check_adapter(file, "a");
  const std::vector<std::string> expected{"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"};
  EXPECT_EQ(file.config.target_modules.names, expected);
  TrainingRun run(nullptr, 1, llama(), file.config, {}, 42, &file);
  EXPECT_EQ(run.store.parameters().size(), 4u);
}

TEST(PeftFields, APickleIsRefused) {
  const TemporaryFolder folder;
  write_changed("methods/combine/first", folder.path("a"), json::object(), "nothing");
  std::filesystem::rename(folder.path("a/adapter_model.safetensors"), folder.path("a/adapter_model.bin"));
  expect_refused<InputError>([&] { read_adapter(folder.path("a")); }, {"adapter_model.bin", "save_pretrained"});
}

TEST(PeftFields, ShardsAreRefused) {
  const TemporaryFolder folder;
  write_changed("methods/combine/first", folder.path("a"), json::object(), "nothing");
  std::filesystem::rename(folder.path("a/adapter_model.safetensors"),
                          folder.path("a/adapter_model-00001-of-00001.safetensors"));
  DiskStorage().write_file(folder.path("a/adapter_model.safetensors.index.json"), "{}");
  expect_refused<InputError>([&] { read_adapter(folder.path("a")); }, {"several files", "save_pretrained"});
}

TEST(PeftTensors, WholeNumbersAreRefused) {
  const TemporaryFolder folder;
  for (const at::ScalarType type : {at::kLong, at::kInt, at::kChar, at::kByte, at::kBool}) {
    const std::string name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight";
    write_changed("methods/combine/first", folder.path("a"), json::object(), "nothing",
                  {{name, at::ones({4, 64}, type)}});
    expect_refused<InputError>([&] { read_adapter(folder.path("a")); },
                               {"adapter_model.safetensors", name, c10::toString(type)});
  }
}

TEST(PeftTensors, HalfPrecisionGoesThroughAFileOfOurs) {
  SavedAdapter file = combine_input("first");
  for (auto& [name, tensor] : file.tensors) tensor = tensor.to(at::kBFloat16);
  const TemporaryFolder folder;
  DiskStorage().write_file(folder.path("a.h5"), adapter_h5_image(file));
  const SavedAdapter back = read_adapter(folder.path("a.h5"));
  ASSERT_EQ(back.tensors.size(), file.tensors.size());
  const std::map<std::string, at::Tensor> tensors(back.tensors.begin(), back.tensors.end());
  for (const auto& [name, tensor] : file.tensors)
    EXPECT_TRUE(at::equal(tensors.at(name), tensor.to(at::kFloat))) << name;
}

/// PEFT leaves embedding and head in the block of linears where they are adapted too, with lora_embedding_A.
TEST(PeftTensors, AnAdapterOnEmbeddingOrHeadIsRefusedByName) {
  const std::string start = "base_model.model.";
  const NamedTensors head{{start + "lm_head.lora_A.weight", at::ones({4, 64})},
                          {start + "lm_head.lora_B.weight", at::ones({256, 4})}};
  const NamedTensors embedding{{start + "model.embed_tokens.lora_embedding_A", at::ones({4, 256})},
                               {start + "model.embed_tokens.lora_embedding_B", at::ones({64, 4})},
                               {start + "model.embed_tokens.base_layer.weight", at::ones({256, 64})}};
  for (const auto& [module, tensors] : {std::pair{"lm_head", head}, std::pair{"model.embed_tokens", embedding}}) {
    const TemporaryFolder folder;
    write_changed("methods/combine/first", folder.path("a"), json::object(), "nothing", tensors);
    std::string said;
    try {
      check_adapter(read_adapter(folder.path("a")), "a");
    } catch (const InputError& error) {
      said = error.what();
    }
    for (const char* word : {"a: target_modules", module, "modules_to_save"})
      EXPECT_NE(said.find(word), std::string::npos) << said;
    EXPECT_EQ(said.find("damaged"), std::string::npos) << said;
  }
}

/// An adapter of the untied or of the tied golden model, with tensors saved along.
SavedAdapter with_along(const std::string& adapter, const NamedTensors& along) {
  const TemporaryFolder folder;
  write_changed(adapter, folder.path("a"), json::object(), "nothing", along);
  SavedAdapter file = read_adapter(folder.path("a"));
  check_adapter(file, "a");
  return file;
}

SavedAdapter placed(SavedAdapter file, const ModelOptions& options) {
  Ledger ledger;
  place_saved_along(file, *outline_model(options, *make_solo_communicator(at::kCPU, ledger)), options, "a");
  return file;
}

const std::string kEmbedding = "base_model.model.model.embed_tokens.weight", kHead = "base_model.model.lm_head.weight";

TEST(SavedAlong, WhatIsTheBasesIsLeftOut) {
  WeightFile base(llama().path);
  const at::Tensor embedding = base.read("model.embed_tokens.weight"), head = base.read("lm_head.weight");
  const size_t plain = combine_input("first").tensors.size();
  for (const NamedTensors& along : {NamedTensors{{kEmbedding, embedding}, {kHead, head}},
                                    NamedTensors{{kEmbedding, embedding}}, NamedTensors{{kHead, head}}}) {
    const SavedAdapter file = with_along("methods/combine/first", along);
    EXPECT_EQ(saved_along(file).size(), along.size());
    const SavedAdapter result = placed(file, llama());
    EXPECT_EQ(result.tensors.size(), plain);
    EXPECT_TRUE(result.config.modules_to_save.empty());
  }
  // in 16 bits a model computes with what is left of both
  ModelOptions half = llama();
  half.dtype = at::kBFloat16;
  const SavedAdapter rounded = with_along("methods/combine/first", {{kHead, head.to(at::kBFloat16)}});
  EXPECT_TRUE(placed(rounded, half).config.modules_to_save.empty());
  EXPECT_EQ(placed(rounded, llama()).config.modules_to_save, std::vector<std::string>{"lm_head"});
}

/// As PEFT loads it: the logits are those of a base that holds the tensor.
TEST(SavedAlong, OtherValuesTakeThePlaceOfTheBases) {
  const std::vector<int64_t> tokens{3, 1, 4, 1, 5, 9, 2, 6};
  WeightFile base(llama().path);
  NamedTensors weights, along;
  for (const std::string& name : base.names()) {
    at::Tensor tensor = base.read(name);
    if (name == "lm_head.weight" || name == "model.embed_tokens.weight") {
      tensor = tensor * 1.5;
      along.emplace_back("base_model.model." + name, tensor);
    }
    weights.emplace_back(name, tensor);
  }
  const TemporaryFolder folder;
  DiskStorage().make_folders(folder.path("model"));
  std::filesystem::copy(llama().path + "/config.json", folder.path("model/config.json"));
  DiskStorage().write_file(folder.path("model/model.safetensors"), safetensors_image(weights));
  ModelOptions other = llama();
  other.path = folder.path("model");
  const SavedAdapter plain = combine_input("first"), file = placed(with_along("methods/combine/first", along), llama());
  EXPECT_EQ(file.config.modules_to_save, (std::vector<std::string>{"lm_head", "model.embed_tokens"}));
  TrainingRun expected(nullptr, 1, other, plain.config, {}, 42, &plain);
  const at::Tensor logits = all_logits(*expected.model, tokens, expected.mesh.tp());
  EXPECT_LT(relative_error(logits_of(file, tokens), logits), 1e-6);
  EXPECT_GT(relative_error(logits_of(plain, tokens), logits), 1e-2);
}

TEST(SavedAlong, OfATiedModelOnlyItsOwnIsTaken) {
  ModelOptions tied = llama();
  tied.path = golden("llama_tied_llama3rope/model");
  const std::string adapter = "llama_tied_llama3rope/adapter";
  const at::Tensor embedding = WeightFile(tied.path).read("model.embed_tokens.weight");
  const SavedAdapter same = placed(with_along(adapter, {{kEmbedding, embedding}, {kHead, embedding}}), tied);
  EXPECT_EQ(same.tensors.size(), read_adapter(golden(adapter)).tensors.size());
  EXPECT_TRUE(same.config.modules_to_save.empty());
  for (const std::string& name : {kEmbedding, kHead}) {
    expect_refused<InputError>(
        [&] {
          placed(with_along(adapter, {{name, embedding * 2}}), tied);
        },
        {"a: " + name, "tied", "model.path"});
  }
}

TEST(SavedAlong, AResizedVocabularyIsRefusedWithBothShapes) {
  const at::Tensor head = WeightFile(llama().path).read("lm_head.weight");
  const int64_t rows = head.size(0), columns = head.size(1);
  const SavedAdapter file = with_along("methods/combine/first", {{kHead, at::cat({head, at::zeros({2, columns})})}});
  expect_refused<InputError>([&] { placed(file, llama()); },
                             {kHead, fmt::format("[{}, {}]", rows + 2, columns), fmt::format("[{}, {}]", rows, columns),
                              "resize_token_embeddings"});
  expect_refused<InputError>(
      [&] {
        placed(with_along("methods/combine/first", {{"base_model.model.transformer.wte.weight", head}}), llama());
      },
      {"transformer.wte.weight", "another model"});
}

/// modules_to_save with save_embedding_layers: PEFT 0.21 writes three copies of the module.
TEST(SavedAlong, CopiesOfAModuleToSaveAreOne) {
  const at::Tensor head = WeightFile(llama().path).read("lm_head.weight") * 2;
  const TemporaryFolder folder;
  const auto write = [&](const at::Tensor& second) {
    write_changed("methods/combine/first", folder.path("a"), {{"modules_to_save", {"lm_head"}}}, "nothing",
                  {{kHead, head},
                   {"base_model.model.lm_head.modules_to_save.weight", second},
                   {"base_model.model.lm_head.original_module.weight", head * 0}});
  };
  write(head);
  const SavedAdapter file = read_adapter(folder.path("a"));
  check_adapter(file, "a");
  EXPECT_EQ(file.tensors.size(), combine_input("first").tensors.size() + 1);
  write(head * 3);
  expect_refused<InputError>([&] { read_adapter(folder.path("a")); }, {kHead, "twice"});
  write_changed("methods/combine/first", folder.path("a"), json::object(), "nothing",
                {{"base_model.model.lm_head.modules_to_save.default.weight", head}});
  expect_refused<InputError>([&] { read_adapter(folder.path("a")); }, {"lm_head", "modules_to_save", "does not name"});
}

TEST(SavedAlong, StaysBesideTheAdapterInFilesAndIsNotCombined) {
  const at::Tensor head = WeightFile(llama().path).read("lm_head.weight");
  const SavedAdapter file = with_along("methods/combine/first", {{kHead, head}});
  const TemporaryFolder folder;
  DiskStorage disk;
  disk.write_file(folder.path("a.h5"), adapter_h5_image(file));
  write_peft_folder(disk, folder.path("b"), read_adapter(folder.path("a.h5")));
  const SavedAdapter back = read_adapter(folder.path("b"));
  EXPECT_EQ(saved_along(back), std::vector<std::string>{"lm_head"});
  EXPECT_TRUE(back.config.modules_to_save.empty());
  expect_refused<ConfigError>([&] { to_plain_lora(file, {}); }, {"lm_head", "--base"});
  expect_refused<ConfigError>(
      [&] {
        combine({{"one", file, 1}, {"two", file, 1}}, "cat", {});
      },
      {"one", "lm_head", "--base"});
}

/// Whatever the folder's layout: [out, in], as the model itself takes it.
TEST(LinearReader, GivesTheWeightsOfTheModel) {
  for (const char* folder : {"llama/model", "families/gpt2/model", "methods/llama_nf4/model"}) {
    SCOPED_TRACE(folder);
    ModelOptions options = llama();
    options.path = golden(folder);
    if (std::string(folder).starts_with("methods/")) options.quantization = "nf4";
    Ledger ledger;
    const auto solo = make_solo_communicator(at::kCPU, ledger);
    const auto model = load_model(options, *solo);
    LinearReader reader(options.path);
    for (const AdaptedLinear* linear : model->linears()) {
      EXPECT_TRUE(at::equal(reader.read(linear->name()), linear->weight().dense_OI())) << linear->name();
    }
    expect_refused<InputError>([&] { reader.read("model.layers.9.mlp.up_proj"); }, {"layers.9", "another model"});
  }
}

}  // namespace
}  // namespace corank::test
