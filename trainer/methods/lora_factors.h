#pragma once
#include "trainer/layers/adapter.h"
#include "trainer/layers/low_rank.h"
#include "trainer/methods/config.h"
#include "trainer/methods/peft_name.h"

namespace corank {

/// A [r, in] and B [out, r] of one linear, in a ParameterStore. Tensor parallel by the weight-side schedule
/// (methods 10.1): the factor that a split does not touch (A of a column-parallel linear, B of a row-parallel one) is
/// replicated, its gradient a partial sum.
class LoraFactors {
 public:
  /// What a method names and fills differently from LoRA.
  struct Options {
    std::string a_suffix = ".lora_A.weight", b_suffix = ".lora_B.weight";
    int64_t rank = 0;
    double scale = 1;
    /// Fill a rank's block of the full tensor `spec`; none: zeros.
    std::function<void(const ParameterSpec&spec, const at::Tensor&local)> fill_a, fill_b;
  };

  /// Registers both; valid while this object stays where it is.
  void add_to(ParameterStore& store, const LinearSite& site, const Options& options);
  LowRank low_rank(const ops::Dropout& dropout = {}) const { return {a_RI_, b_OR_, scale_, dropout}; }

 private:
  double scale_ = 1;
  ops::Weight a_RI_, b_OR_;
};

/// y = x W^T + s drop(x) A^T B^T.
class LoraAdapter : public Adapter {
 public:
  explicit LoraAdapter(double dropout) : dropout_(dropout) {}
  std::shared_ptr<const Update> update(const ops::Dropout& dropout) const override {
    return std::make_shared<LowRankUpdate>(factors.low_rank(dropout));
  }
  double dropout() const override { return dropout_; }

  LoraFactors factors;

 private:
  double dropout_;
};

/// Rank, scaling and PEFT's initial values of LoRA (methods 1.3): kaiming_uniform(a = sqrt 5) is U(-1/sqrt in, 1/sqrt
/// in) with the full fan-in, gaussian is N(0, 1/r^2); B starts at 0.
LoraFactors::Options lora_options(const AdapterConfig& config, const LinearSite& site, uint64_t seed);

}  // namespace corank
