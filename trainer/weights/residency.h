#pragma once
#include <ATen/ATen.h>

#include <memory>
#include <string>
#include <vector>

#include "comm/communicator.h"

namespace corank {

/// What a weight is asked for. Forward passes ask for the weights in their order, backward passes in its reverse.
enum class Pass {
  forward,
  backward,
  apart,  ///< no product of a pass: norms, merging
};

/// The stored tensors of one frozen weight, wherever they are between products. The weight owns it.
class StoredBytes {
 public:
  virtual ~StoredBytes() = default;
  /// The tensors on the run's device. They are the caller's until it lets go of them.
  virtual std::vector<at::Tensor> on_device(Pass pass) const = 0;
  /// Bytes that stay on the device between products.
  virtual int64_t device_bytes() const = 0;
  /// Bytes that this rank hands to others each time the weight is brought to the device; 0: it is never sent.
  virtual int64_t gather_bytes() const { return 0; }
};

/// How the data-parallel ranks share a weight that trains: its elements laid flat are cut into equal parts, the last
/// with zeros behind it. All that is collective is so over them.
class TrainedShare {
 public:
  virtual ~TrainedShare() = default;
  /// Elements of a part of `elements`.
  virtual int64_t part_elements(int64_t elements) const = 0;
  /// This rank's part of a tensor, flat, in memory of its own.
  virtual at::Tensor part_of(const at::Tensor& block) const = 0;
  /// Collective. The tensor of `shape` from the ranks' parts (purpose checkpoint).
  virtual at::Tensor whole(const at::Tensor& part, at::IntArrayRef shape) const = 0;
  /// Collective, within a backward pass. Adds this rank's part of the ranks' summed gradients of the whole tensor to
  /// the gradient of `leaf`, perhaps on another stream; done when the backward pass is (purpose weight_gradients).
  virtual void add_gradient(const at::Tensor& leaf, at::Tensor gradient) = 0;
};

/// Where the bytes of frozen weights are. A format says how bytes become a product and knows nothing of this. Outlives
/// the weights.
class Residency {
 public:
  virtual ~Residency() = default;
  /// Takes over a weight's tensors, which are on the run's device. `order`: its place in forward, from 0; weights of
  /// one input share a number, and it comes again where a weight is made anew.
  virtual std::unique_ptr<StoredBytes> keep(int64_t order, std::vector<at::Tensor> tensors) = 0;
  /// The same for a weight that trains, of `shape`, whose values change in place: all of it, or with trained_share()
  /// this rank's part, flat.
  virtual std::unique_ptr<StoredBytes> keep_trained(int64_t order, const at::Tensor& values, at::IntArrayRef shape) = 0;
  /// How ranks share what trains and is multiplied in `dtype`; null: each has all of it.
  virtual std::shared_ptr<TrainedShare> trained_share(at::ScalarType /*dtype*/) { return nullptr; }
  /// Memory of [O, I] in which several weights of one input may lie one above the other, so that they can be one
  /// product; undefined where weights come and go one by one.
  virtual at::Tensor shared_room(at::IntArrayRef shape, const at::TensorOptions& options) = 0;
  /// A model says that a forward pass begins: the first weight is next.
  virtual void begin_forward() {}
};

/// All weights stay on the device.
std::shared_ptr<Residency> resident();

/// Values of parallel.shard_base, in order.
std::vector<std::string> shard_base_names();
/// Collective over `dp`, the data-parallel ranks, which hold the same weights. Where parallel.shard_base leaves them; a
/// rank alone has all of them.
std::shared_ptr<Residency> make_residency(const std::string& shard_base, Communicator& dp);

}  // namespace corank
