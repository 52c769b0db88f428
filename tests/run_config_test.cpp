#include "launch/checks.h"
#include "tests/support.h"

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
std::string complaint(const Overrides& overrides,
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

struct Refusal {
  Overrides overrides;
  std::vector<std::string> words;  ///< of the message
};

TEST(Refusals, MethodsAndKeysThatDoNotBelongTogether) {
  const std::vector<Refusal> refusals{
      {{"adapter.method=full", "model.quantization=nf4"}, {"model.quantization", "nf4 cannot train", "method full"}},
      {{"adapter.method=full", "model.quantization=int8"}, {"model.quantization", "int8 cannot train"}},
      {{"model.quantization=int8", "model.double_quant=true"}, {"model.double_quant", "int8"}},
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
    const std::string said = complaint(overrides);
    for (const std::string& word : words) EXPECT_NE(said.find(word), std::string::npos) << overrides[0] << ": " << said;
  }
}

TEST(Refusals, ValuesThatAMethodCannotHave) {
  const std::vector<Refusal> refusals{
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
    const std::string said = complaint(overrides);
    for (const std::string& word : words) EXPECT_NE(said.find(word), std::string::npos) << overrides[0] << ": " << said;
  }
}

/// A folder that bitsandbytes has quantised.
TEST(Refusals, WhatAQuantisedFolderCannotGive) {
  const Overrides nf4{"model.shape=null", "model.path=" + golden("methods/llama_nf4/model")};
  const Overrides no_data{"data.train=null", "data.eval=null", "eval_steps=0"};
  for (const auto& [overrides, words] :
       std::vector<Refusal>{{{"adapter.method=pissa", "adapter.lora_alpha=8", "model.quantization=nf4"},
                             {"q_proj", "4 bits", "16 bits"}},
                            {{"adapter.method=lora"}, {"model.quantization: none", "Write model.quantization: nf4"}},
                            {{"adapter.method=full"}, {"model.quantization: none", "nf4"}},
                            {{"model.quantization=int8"}, {"model.quantization: int8", "nf4"}}}) {
    const std::string said = complaint(overrides + nf4, no_data, check_bench);
    for (const std::string& word : words) EXPECT_NE(said.find(word), std::string::npos) << overrides[0] << ": " << said;
  }
}

/// A LoRA run file becomes another method's by one override (README), over every format that is not refused above.
TEST(Methods, OneOverrideMakesAnotherMethodOfALoraRun) {
  for (const std::string& method : method_names()) {
    for (const std::string& format : format_names()) {
      const bool refused = method == "full" && format != "none";
      EXPECT_EQ(complaint({"adapter.method=" + method, "model.quantization=" + format}).empty(), !refused)
          << method << " " << format;
    }
  }
}

}  // namespace
}  // namespace corank::test
