#pragma once
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "trainer/layers/adapter.h"
#include "trainer/layers/forward_context.h"
#include "trainer/layers/projection.h"
#include "trainer/weights/frozen_weight.h"

namespace corank {

/// The linear of the Transformer blocks: frozen weight, optional bias, optional adapter; knows its place in tensor
/// parallelism. Adapters and formats meet only here.
class AdaptedLinear {
 public:
  /// `bias_O`: this rank's block, or undefined. `adds_bias`: false where another rank of the row-parallel sum adds it.
  AdaptedLinear(LinearSite site, BaseWeight base, at::Tensor bias_O, bool adds_bias);

  const LinearSite& site() const { return site_; }
  const std::string& name() const { return site_.name; }
  const FrozenWeight& weight() const { return *weight_; }
  /// ConfigError if the model's files do not hold the whole weight but only 4 bits of it.
  void require_full_base() const;
  /// model.quantization of its weight.
  const std::string& format() const { return base_.format.name; }
  /// The whole weight [out, in] as the model's files have it, in the compute dtype, on the run's device.
  at::Tensor read_base() const;
  /// Makes the frozen weight anew, from what `change` makes of read_base() in float32 (none: as it was at first). What
  /// earlier changes left is forgotten.
  void rebuild(const std::function<at::Tensor(const at::Tensor& full_OI)>& change = {});
  /// Collective over tp. The whole frozen weight [out, in] as the run has it, in the compute dtype.
  at::Tensor gather_weight(Communicator& tp) const;
  /// Until rebuild(), the linear is the product with w_OI [out, in], held dense in the compute dtype, and its adapter
  /// rests.
  void merge(const at::Tensor& w_OI);
  bool is_merged() const { return is_merged_; }
  /// Whether the frozen weight is the model's own: neither merged nor changed.
  bool is_original() const { return is_original_; }
  /// What the frozen weight would show of the whole `full_OI`: quantised and back. float32.
  at::Tensor stored_form(const at::Tensor& full_OI) const;
  /// Of the full linear: weight and bias.
  int64_t num_base_parameters() const { return site_.in * site_.out + (bias_O_.defined() ? site_.out : 0); }
  /// Returns the one before; null: none.
  std::unique_ptr<Adapter> set_adapter(std::unique_ptr<Adapter> adapter) {
    return std::exchange(adapter_, std::move(adapter));
  }
  const Adapter* adapter() const { return adapter_.get(); }
  /// Registers weight and bias as trainable (full fine-tuning).
  void train_base(ParameterStore& store);

  /// `rows_N`: which tokens of the batch the input's rows are, int64; undefined: all, in their order.
  Projection projection(const ForwardContext& context, const at::Tensor& rows_N = {}) const;

 private:
  LinearSite site_;
  BaseWeight base_;
  std::unique_ptr<FrozenWeight> weight_;
  at::Tensor weight_leaf_;
  std::shared_ptr<TrainedShare> weight_share_;
  ops::Weight bias_O_;
  bool adds_bias_;
  bool is_merged_ = false, is_original_ = true;
  std::unique_ptr<Adapter> adapter_;
};

/// Collective over tp in backward. Column-parallel linears that read one input x_NI: local outputs [N, O_i / T].
/// `rows_N` as in AdaptedLinear::projection, equal on all tp ranks: linears that see some of the tokens only (experts).
std::vector<at::Tensor> column_forward(const std::vector<const AdaptedLinear*>& linears, const at::Tensor& x_NI,
                                       const ForwardContext& context, const at::Tensor& rows_N = {});
/// Collective over tp in forward. Row-parallel: x holds this rank's features; returns the full [N, O].
at::Tensor row_forward(const AdaptedLinear& linear, const at::Tensor& x_NI, const ForwardContext& context,
                       const at::Tensor& rows_N = {});

}  // namespace corank
