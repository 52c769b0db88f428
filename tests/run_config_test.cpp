#include <fstream>
#include <sstream>

#include "launch/checks.h"
#include "tests/support.h"
#include "trainer/methods/config_keys.h"
#include "trainer/methods/merge_config.h"
#include "trainer/methods/methods.h"
#include "trainer/methods/rank_budget.h"

// What makes no sense together is refused before anything is started, by name and with the reason.
namespace corank::test {
namespace {

using Overrides = std::vector<std::string>;

Overrides operator+(Overrides a, const Overrides& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

/// What the checks before a start say about configs/tiny.yaml with `overrides`; empty: nothing. `data`: the run file's
/// own paths are relative to where tests are not started.
std::string run_complaint(const Overrides& overrides,
                          const Overrides& data = {"data.train=" + repository("configs/tiny/train.h5"),
                                                   "data.eval=" + repository("configs/tiny/eval.h5"),
                                                   "output_dir=" + testing::TempDir() + "corank_never_made"},
                          CheckedInputs (*check)(const RunConfig&, int) = check_training) {
  try {
    const RunConfig run = read_run(repository("configs/tiny.yaml"), overrides + data);
    check(run, static_cast<int>(run.parallel.tensor));
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

struct RunRefusal {
  Overrides overrides;
  std::vector<std::string> words;  ///< of the message
};

TEST(Refusals, MethodsAndKeysThatDoNotBelongTogether) {
  const std::vector<RunRefusal> refusals{
      {{"adapter.method=full", "model.quantization=nf4"}, {"model.quantization", "nf4 cannot train", "method full"}},
      {{"adapter.method=full", "model.quantization=int8"}, {"model.quantization", "int8 cannot train"}},
      {{"model.quantization=int8", "model.double_quant=false"}, {"model.double_quant", "int8"}},
      {{"model.double_quant=false"}, {"model.double_quant", "nf4"}},
      {{"model.quantization=nf5"}, {"model.quantization", "nf4"}},
      {{"adapter.method=pissa", "adapter.pissa_iterations=2"}, {"adapter.pissa_iterations", "quantization is none"}},
      {{"adapter.method=dorra"}, {"adapter.method", "dora"}},
      {{"adapter.method=adalora", "adapter.use_rslora=true"}, {"adapter.use_rslora", "lora, dora, pissa", "adalora"}},
      {{"adapter.method=adalora", "adapter.rank_pattern={q_proj: 4}"}, {"adapter.rank_pattern", "adalora"}},
      {{"adapter.method=adalora", "adapter.init_lora_weights=gaussian"}, {"adapter.init_lora_weights", "adalora"}},
      {{"adapter.method=mora", "adapter.use_rslora=true"}, {"adapter.use_rslora", "mora"}},
      {{"adapter.method=mora", "adapter.alpha_pattern={q_proj: 4}"}, {"adapter.alpha_pattern", "mora"}},
      {{"adapter.method=mora", "adapter.init_lora_weights=gaussian"}, {"adapter.init_lora_weights", "mora"}},
      {{"adapter.method=pissa", "adapter.init_lora_weights=gaussian"}, {"adapter.init_lora_weights", "pissa"}},
      {{"adapter.method=dora", "adapter.init_r=12"}, {"adapter.init_r", "adalora", "dora"}},
      {{"adapter.method=dora", "adapter.mora_type=6"}, {"adapter.mora_type", "mora", "dora"}},
      {{"adapter.pissa_niter=4"}, {"adapter.pissa_niter", "pissa", "lora"}},
      {{"adapter.method=full", "adapter.modules_to_save=[lm_head]"}, {"adapter.modules_to_save", "full"}},
      {{"adapter.method=full", "adapter.loraplus_lr_ratio=16"}, {"adapter.loraplus_lr_ratio", "full"}},
  };
  for (const auto& [overrides, words] : refusals) {
    const std::string said = run_complaint(overrides);
    for (const std::string& word : words) EXPECT_NE(said.find(word), std::string::npos) << overrides[0] << ": " << said;
  }
}

TEST(Refusals, ValuesThatAMethodCannotHave) {
  const std::vector<RunRefusal> refusals{
      {{"adapter.method=mora", "adapter.mora_type=5"}, {"adapter.mora_type", "5", "1, 2, 3, 4, 6"}},
      {{"adapter.method=mora", "adapter.r=300"}, {"adapter.r", "MoRA's matrix", "q_proj", "smaller"}},
      {{"adapter.method=pissa", "adapter.r=64"}, {"adapter.r", "k_proj", "32 singular values", "smaller"}},
      {{"adapter.method=pissa", "adapter.pissa_niter=-1"}, {"adapter.pissa_niter", "-1"}},
      {{"adapter.method=adalora", "adapter.target_r=13"}, {"adapter.target_r", "init_r"}},
      {{"adapter.method=adalora", "adapter.tinit=20"}, {"adapter.tinit", "train longer"}},
      {{"adapter.method=adalora", "adapter.beta1=1"}, {"adapter.beta1", "(0, 1)"}},
      {{"adapter.loraplus_lr_ratio=0"}, {"adapter.loraplus_lr_ratio", "above 0"}},
      {{"adapter.modules_to_save=[q_proj]"}, {"adapter.modules_to_save", "q_proj", "embedding"}},
      {{"adapter.rank_pattern={z_proj: 4}"}, {"adapter.rank_pattern", "z_proj"}},
      {{"parallel.tensor=3"}, {"parallel.tensor", "3", "attention heads"}},
      {{"model.shape=tiny-gpt2", "adapter.method=mora", "parallel.tensor=2"}, {"mora cannot split", "c_attn"}},
      {{"model.shape=tiny-gpt2", "model.quantization=nf4", "parallel.tensor=2"}, {"c_attn", "parallel.tensor to 1"}},
  };
  for (const auto& [overrides, words] : refusals) {
    const std::string said = run_complaint(overrides);
    for (const std::string& word : words) EXPECT_NE(said.find(word), std::string::npos) << overrides[0] << ": " << said;
  }
}

/// A folder that bitsandbytes has quantised.
TEST(Refusals, WhatAQuantisedFolderCannotGive) {
  const Overrides nf4{"model.shape=null", "model.path=" + golden("methods/llama_nf4/model")};
  const Overrides no_data{"data.train=null", "data.eval=null", "eval_steps=0"};
  for (const auto& [overrides, words] :
       std::vector<RunRefusal>{{{"adapter.method=pissa", "adapter.lora_alpha=8", "model.quantization=nf4"},
                                {"q_proj", "4 bits", "16 bits"}},
                               {{"adapter.method=lora"}, {"model.quantization: none", "Write model.quantization: nf4"}},
                               {{"adapter.method=full"}, {"model.quantization: none", "nf4"}},
                               {{"model.quantization=int8"}, {"model.quantization: int8", "nf4"}}}) {
    const std::string said = run_complaint(overrides + nf4, no_data, check_bench);
    for (const std::string& word : words) EXPECT_NE(said.find(word), std::string::npos) << overrides[0] << ": " << said;
  }
}

/// A LoRA run file becomes another method's by one override (README), over every format that is not refused above.
TEST(Methods, OneOverrideMakesAnotherMethodOfALoraRun) {
  for (const std::string& method : method_names()) {
    for (const std::string& format : format_names()) {
      AdapterConfig config;
      config.method = method;
      const bool refused = make_method(config)->trains_base() && format != "none";
      EXPECT_EQ(run_complaint({"adapter.method=" + method, "model.quantization=" + format}).empty(), !refused)
          << method << " " << format;
    }
  }
}

/// What a run takes from the adapter that it starts from, and what it says itself: each may be good, and not together.
TEST(Methods, ARunFilesKeysAreCheckedBesideThoseOfItsAdapter) {
  AdapterConfig file;
  file.method = "adalora";
  file.options.edit<AdaLoraConfig>().init_r = 6;
  file.options.edit<AdaLoraConfig>().target_r = 3;
  const auto merged = [&](const std::string& key, const std::string& value) {
    const AdapterConfig run = read_adapter_config(Section::parse("path: there\n" + key + ": " + value, "run.yaml"));
    return merge_with_file(run, {"path", key}, file, {{"model.layers.0.self_attn.q_proj"}, {}});
  };
  EXPECT_EQ(merged("init_r", "6").options.get<AdaLoraConfig>().target_r, 3);
  EXPECT_EQ(merged("target_r", "5").options.get<AdaLoraConfig>().target_r, 5);
  for (const auto& [key, value, words] : {std::tuple{"init_r", "7", "the run file says 7, there says 6"},
                                          {"target_r", "7", "adapter.target_r: 7 is not in [0, init_r]"},
                                          {"beta1", "5", "adapter.beta1: 5 is not in (0, 1)"},
                                          {"use_rslora", "true", "belongs to method lora, dora, pissa, there holds"}}) {
    try {
      merged(key, value);
      ADD_FAILURE() << key << ": " << value;
    } catch (const ConfigError& error) {
      EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
    }
  }
}

// ---- every key of the run file

enum class Kind { text, name, whole, number, flag, list, numbers, map, pattern };

/// One key, the method beside which it stands, and what else the file holds then.
struct Key {
  std::string section, name;
  Kind kind;
  std::string method = "lora";
};

std::vector<Key> all_keys() {
  std::vector<Key> keys{
      {"model", "path", Kind::text},
      {"model", "shape", Kind::text},
      {"model", "dtype", Kind::name},
      {"model", "quantization", Kind::name},
      {"model", "double_quant", Kind::flag},
      {"data", "train", Kind::text},
      {"data", "eval", Kind::text},
      {"data", "seq_len", Kind::whole},
      {"data", "packing", Kind::flag},
      {"data", "shuffle", Kind::flag},
      {"parallel", "tensor", Kind::whole},
      {"parallel", "backend", Kind::name},
      {"parallel", "shard_base", Kind::name},
      {"train", "max_steps", Kind::whole},
      {"train", "num_train_epochs", Kind::number},
      {"train", "warmup_steps", Kind::whole},
      {"train", "warmup_ratio", Kind::number},
      {"train", "global_batch_size", Kind::whole},
      {"train", "micro_batch_size", Kind::whole},
      {"train", "learning_rate", Kind::number},
      {"train", "lr_scheduler_type", Kind::name},
      {"train", "weight_decay", Kind::number},
      {"train", "adam_beta1", Kind::number},
      {"train", "adam_beta2", Kind::number},
      {"train", "adam_epsilon", Kind::number},
      {"train", "max_grad_norm", Kind::number},
      {"train", "seed", Kind::whole},
      {"train", "activation_checkpointing", Kind::name},
      {"train", "reproducible", Kind::flag},
      {"", "output_dir", Kind::text},
      {"", "logging_steps", Kind::whole},
      {"", "eval_steps", Kind::whole},
      {"", "save_steps", Kind::whole},
      {"", "save_total_limit", Kind::whole},
      {"", "resume", Kind::text},
  };
  const std::map<std::string, Kind> adapter{
      {"method", Kind::name},
      {"r", Kind::whole},
      {"lora_alpha", Kind::number},
      {"lora_dropout", Kind::number},
      {"use_rslora", Kind::flag},
      {"target_modules", Kind::pattern},
      {"exclude_modules", Kind::pattern},
      {"rank_pattern", Kind::map},
      {"alpha_pattern", Kind::map},
      {"init_lora_weights", Kind::name},
      {"loraplus_lr_ratio", Kind::number},
      {"modules_to_save", Kind::list},
      {"mora_type", Kind::whole},
      {"remora_steps", Kind::whole},
      {"remora_types", Kind::numbers},
      {"remora_warmup_steps", Kind::whole},
      {"pissa_niter", Kind::whole},
      {"pissa_iterations", Kind::whole},
      {"init_r", Kind::whole},
      {"target_r", Kind::whole},
      {"tinit", Kind::whole},
      {"tfinal", Kind::whole},
      {"deltaT", Kind::whole},
      {"beta1", Kind::number},
      {"beta2", Kind::number},
      {"orth_reg_weight", Kind::number},
      {"path", Kind::text},
  };
  for (const AdapterKey& key : adapter_keys()) {
    keys.push_back({"adapter", key.name, adapter.at(key.name), key.methods.empty() ? "lora" : key.methods.front()});
  }
  return keys;
}

/// Values that no key of the kind takes.
std::vector<std::string> bad_values(Kind kind) {
  const std::string deep = std::string(40, '[') + "1" + std::string(40, ']');
  std::vector<std::string> values{"", "~", "{a: {b: 1}}", "[[1]]", deep, "*alias", "!!binary eA=="};
  const auto add = [&](const std::vector<std::string>& more) { values.insert(values.end(), more.begin(), more.end()); };
  const std::vector<std::string> no_numbers{"word",
                                            "true",
                                            "[1]",
                                            "[]",
                                            R"("1")",
                                            R"("")",
                                            "1e999",
                                            ".nan",
                                            "-.inf",
                                            "0x10",
                                            "1_000",
                                            "-1e30",
                                            "99999999999999999999999999999999999999999e999"};
  switch (kind) {
    case Kind::text:
      add({"[a]", "[]", R"("a\0b")"});
      break;
    case Kind::name:
      add({"zzz", "-1", R"("")", "[lora]", "1e999", R"("lora\n")"});
      break;
    case Kind::whole:
      add(no_numbers);
      add({"1.5", "-1", "9223372036854775808", "1e3"});
      break;
    case Kind::number:
      add(no_numbers);
      add({"-1"});
      break;
    case Kind::flag:
      add({"1", "yes", "True", R"("true")", R"("")", "[true]"});
      break;
    case Kind::list:
      add({"word", "3", R"("")", "{a: 1}"});
      break;
    case Kind::numbers:
      add({"word", "3", R"("")", "[a]", "[1.5]", "[-1]", "[]", "[1e999]"});
      break;
    case Kind::map:
      add({"word", "[a]", "3", R"("")", "{a: word}", "{a: -1}", "{a: 0}", "{a: 1e999}", "{a: }", R"({"(": 1})",
           "{a: 1, a: 2}"});
      break;
    case Kind::pattern:
      add({R"("")", "[]", "(q", R"('(\w+\.?)+\K')", "'(?R)'", "{a: 1}"});
      break;
  }
  return values;
}

/// The run file of a run with `value` under `key`.
std::string run_with(const Key& key, const std::string& value) {
  std::map<std::string, std::map<std::string, std::string>> sections{
      {"model", {{"shape", "tiny-llama"}}},
      {"adapter", {{"method", key.method}}},
      {"train", {{"max_steps", "2"}}},
  };
  if (key.method == "mora" && key.name.starts_with("remora_")) sections["adapter"]["remora_steps"] = "100";
  if (key.name == "path" && key.section == "model") sections["model"].clear();
  if (key.name == "double_quant") sections["model"]["quantization"] = "nf4";
  sections[key.section][key.name] = value;
  std::string text;
  for (const auto& [section, entries] : sections) {
    if (!section.empty()) text += section + ":\n";
    for (const auto& [name, written] : entries) text += (section.empty() ? "" : "  ") + name + ": " + written + "\n";
  }
  return text;
}

TEST(RunFile, EveryKeyRefusesWhatItCannotBe) {
  const TemporaryFolder folder;
  const std::string path = folder.path("run.yaml");
  for (const Key& key : all_keys()) {
    const std::string name = (key.section.empty() ? "" : key.section + ".") + key.name;
    for (const std::string& value : bad_values(key.kind)) {
      SCOPED_TRACE(name + ": " + value);
      std::ofstream(path) << run_with(key, value);
      std::string said;
      try {
        read_run(path, {});
        ADD_FAILURE() << "taken";
      } catch (const ConfigError& error) {  // anything else ends the test
        said = error.what();
      }
      const bool is_yaml = said.find(".yaml:") != std::string::npos && said.find(name) == std::string::npos;
      EXPECT_TRUE(is_yaml ? value.size() > 5 : said.find(name) != std::string::npos) << said;
      EXPECT_LT(said.size(), 1000u);
    }
  }
}

TEST(RunFile, AKeyOfEverySectionIsInTheTable) {
  const RunConfig run = read_run(repository("configs/tiny.yaml"), {});
  std::set<std::string> known;
  for (const Key& key : all_keys()) known.insert(key.name);
  std::istringstream lines(run.yaml());
  int64_t compared = 0;
  for (std::string line; std::getline(lines, line); ++compared) {
    const std::string key = line.substr(line.find_first_not_of(' '), line.find(':') - line.find_first_not_of(' '));
    EXPECT_TRUE(line.ends_with(":") || known.contains(key)) << line;
  }
  EXPECT_GT(compared, 30);
}

/// run.yaml is a run file: whatever stands in its texts, reading it gives the run again.
TEST(RunFile, IsReadBackAsItWasWritten) {
  const TemporaryFolder folder;
  const std::string nasty = "a\nresume: never\n# identity: \"x\" \\ {b: [c]} \t\x1b \u202e\u00e4 #: - ";
  for (const std::string& text : {nasty, std::string(" x "), std::string("null"), std::string(2000, 'k')}) {
    RunConfig run = read_run(repository("configs/tiny.yaml"), {});
    run.output_dir = run.data.train = run.data.eval = run.resume = run.adapter.path = text;
    run.adapter.modules_to_save = {text};
    run.adapter.exclude_modules = {{text}, {}};
    run.adapter.rank_pattern = {{"q_proj", 4}, {std::string(1500, 'k'), 8}};
    std::ofstream(folder.path("run.yaml")) << run.yaml();
    const RunConfig back = read_run(folder.path("run.yaml"), {});
    EXPECT_EQ(back.yaml(), run.yaml());
    for (const std::string& read : {back.output_dir, back.data.train, back.data.eval, back.resume, back.adapter.path})
      EXPECT_EQ(read, text);
  }
}

}  // namespace
}  // namespace corank::test
