#include "data/batch.h"

namespace corank {

Batch Batch::to(at::Device device) const {
  // A copy to the CPU must be complete when it is used, and only the CUDA stream orders what comes after.
  const bool non_blocking = device.is_cuda();
  Batch moved = *this;
  for (at::Tensor Batch::*member : {&Batch::tokens_N, &Batch::positions_N, &Batch::targets_M, &Batch::target_rows_M,
                                    &Batch::slots_N, &Batch::cu_seqlens}) {
    moved.*member = (this->*member).to(device, non_blocking);
  }
  return moved;
}

}  // namespace corank
