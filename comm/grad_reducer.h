#pragma once
#include "comm/mesh.h"

namespace corank {

/// Sums the gradients of one step over the ranks that hold parts of them. The gradients lie in one flat fp32 buffer of
/// two parts: `everywhere` (factors replicated over tp whose local gradient is a partial sum: summed over dp x tp) and
/// `data` (sharded tensors, and replicated ones whose gradient is exact on every tp rank: summed over dp). Averaging is
/// not its job. methods: LoRA's C-w and R-w schedules need no other traffic for gradients.
class GradReducer {
 public:
  /// Borrows mesh and buffers. `purpose` is adapter_gradients or weight_gradients.
  GradReducer(const Mesh& mesh, at::Tensor everywhere, at::Tensor data, Purpose purpose);

  /// Collective over the world. Afterwards every rank of a group holds the same bits.
  void reduce();

  /// Bytes that reduce() hands to collectives on this rank.
  int64_t payload_bytes() const;

 private:
  const Mesh& mesh_;
  at::Tensor everywhere_, data_;
  Purpose purpose_;
};

}  // namespace corank
