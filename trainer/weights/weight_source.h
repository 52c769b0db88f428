#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "data/weight_file.h"
#include "trainer/ops/quantize.h"
#include "trainer/weights/shard.h"

namespace corank {

/// Where a model's weights come from.
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  /// The block of tensor `name` that `shard` names, on the CPU, padded with zeros. InputError if the tensor is absent,
  /// has another shape than `shape`, is not of a floating type or holds a value that is not finite.
  virtual at::Tensor read(const std::string& name, const std::vector<int64_t>& shape, const Shard& shard) = 0;
  /// All of weight `name`, on the CPU, where the files hold bitsandbytes' NF4; otherwise nothing.
  virtual std::optional<ops::Nf4> read_nf4(const std::string& name, const std::vector<int64_t>& shape) = 0;
  /// Whether both tensors are there, and not equal in shape and values.
  virtual bool differ(const std::string& a, const std::string& b) = 0;
  /// A tensor that this model does not need although the file may hold it (a tied head).
  virtual void skip(const std::string& name) = 0;
  /// Call when the model is complete: InputError if the files hold a tensor that nothing read.
  virtual void finish() = 0;
};

/// A Hugging Face folder; each rank reads only the bytes of its shards. `outline`: headers only, tensors on the meta
/// device.
std::unique_ptr<WeightSource> folder_weights(const std::string& folder, bool outline = false);
/// Random weights of any shape, the same for every layout: N(0, 0.02^2), norms 1, biases 0.
std::unique_ptr<WeightSource> random_weights(uint64_t seed, bool outline = false);

}  // namespace corank
