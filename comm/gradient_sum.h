#pragma once
#include <memory>
#include <string>
#include <vector>

#include "comm/mesh.h"

namespace corank {

/// The gradients of one rank: parts of one flat float32 buffer. methods: LoRA's C-w and R-w schedules need no other
/// traffic for gradients.
struct GradientBuffers {
  at::Tensor everywhere;  ///< factors replicated over tp whose local gradient is a partial sum: summed over dp x tp
  at::Tensor data;        ///< sharded, or replicated and exact on every tp rank: summed over dp
  Purpose purpose = Purpose::adapter_gradients;  ///< or weight_gradients
  int64_t micro_batches = 1;                     ///< of a global batch, at most
};

/// Sums the gradients of a step over its micro-batches and over the ranks that hold parts of them. Averaging is not its
/// job. How it adds up, and in which numbers they travel, is an entry of a table.
///
///   each micro-batch: backward; add_micro_batch(its loss)
///   reduce(); the update; end_step(whether it was made); the buffers are zero again
class GradientSum {
 public:
  /// Borrows mesh and buffers.
  GradientSum(const Mesh& mesh, GradientBuffers buffers);
  virtual ~GradientSum() = default;
  GradientSum(const GradientSum&) = delete;
  GradientSum& operator=(const GradientSum&) = delete;

  /// Behind the backward pass of a micro-batch, which has added its gradient to the buffers. Returns its part of the
  /// step's loss, a float64 scalar, as it is to be added up.
  virtual at::Tensor add_micro_batch(const at::Tensor& loss) { return loss; }
  /// Collective over the world. Afterwards the buffers hold the sum: the same bits on every rank of a group.
  virtual void reduce() = 0;
  /// `done`: the update was made; else this object is as it was before the step.
  virtual void end_step(bool /*done*/) {}
  /// What this rank alone carries on to the next step, and a checkpoint must hold: float32 [everywhere + data], in
  /// place. Undefined: nothing.
  virtual at::Tensor carried() const { return {}; }

 protected:
  struct Part {
    Communicator& group;
    at::Tensor buffer;
  };
  /// Those that are not empty, so that an empty one costs no latency; they are equally long on all ranks of a group.
  const std::vector<Part>& parts() const { return parts_; }
  const Mesh& mesh() const { return mesh_; }
  const GradientBuffers& buffers() const { return buffers_; }

 private:
  const Mesh& mesh_;
  GradientBuffers buffers_;
  std::vector<Part> parts_;
};

/// One way to sum.
struct GradientSumEntry {
  std::string name;
  int64_t kept_bytes = 0;  ///< of memory an element, beside the buffers
  std::unique_ptr<GradientSum> (*make)(const Mesh& mesh, const GradientBuffers& buffers);
  /// What a rank hands over in a step for a part of `elements`, more than none, to a group of several ranks.
  Transfer (*transfer)(int64_t elements);
};

const GradientSumEntry& plain_sum();     ///< "float32": in float32, in the order of ranks and collectives
const GradientSumEntry& bfloat16_sum();  ///< "bfloat16": half the bytes; what rounding drops goes into the next step
const GradientSumEntry& exact_sum();     ///< "exact": of whole numbers, the same bits in every order

/// InternalError if there is none of the name.
const GradientSumEntry& gradient_sum(const std::string& name);

}  // namespace corank
