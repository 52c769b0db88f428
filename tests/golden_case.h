#pragma once
#include <nlohmann/json.hpp>

#include "data/file.h"
#include "data/safetensors.h"
#include "tests/support.h"

namespace corank::test {

/// One folder of reference values (tests/golden/make_golden.py).
class Golden {
 public:
  /// Cases below methods/ share model and batch of the case llama.
  explicit Golden(const std::string& name)
      : folder_(golden(name)),
        base_(name.starts_with("methods/") ? golden("llama") : folder_),
        batch_(nlohmann::json::parse(read_file(base_ + "/batch.json"))),
        reference_(folder_ + "/reference.safetensors") {}

  const nlohmann::json& batch() const { return batch_; }
  at::Tensor value(const std::string& name) const { return reference_.read(name); }
  double number(const std::string& name) const { return value(name).item<double>(); }
  bool has(const std::string& name) const { return reference_.tensors().count(name) > 0; }
  std::string path(const std::string& name) const { return folder_ + "/" + name; }
  std::string model() const { return base_ + "/model"; }

  std::vector<int64_t> tokens(int64_t sample) const {
    return batch_["samples"][sample]["tokens"].get<std::vector<int64_t>>();
  }

  /// Samples as rows of one global batch, split into micro-batches as batch.json says: those of one of `dp_size` ranks.
  StepBatches batches(size_t dp_rank = 0, size_t dp_size = 1) const {
    StepBatches step;
    const nlohmann::json& all = batch_["micro_batches"];
    int64_t first = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      std::vector<std::vector<Sample>> sequences;
      for (const nlohmann::json& index : all[i]) sequences.push_back({sample(index.get<int64_t>())});
      const int64_t start = first;
      first += static_cast<int64_t>(sequences.size());
      const Batch batch = make_batch(sequences, start, 512);
      step.num_targets += batch.num_targets();
      step.num_tokens += batch.num_tokens();
      if (i % dp_size == dp_rank) step.micro_batches.push_back(batch);
    }
    return step;
  }

 private:
  Sample sample(int64_t index) const {
    const nlohmann::json& s = batch_["samples"][index];
    return {at::tensor(s["tokens"].get<std::vector<int64_t>>(), at::kLong).to(at::kInt),
            at::tensor(s["loss_mask"].get<std::vector<int64_t>>(), at::kLong).to(at::kByte)};
  }

  std::string folder_, base_;
  nlohmann::json batch_;
  SafetensorsFile reference_;
};

/// The folders of make_families.py.
inline std::vector<std::string> family_cases() {
  return {"families/qwen2", "families/qwen2_window", "families/qwen3",     "families/mistral",
          "families/phi3",  "families/gpt2",         "families/qwen2_yarn"};
}

}  // namespace corank::test
