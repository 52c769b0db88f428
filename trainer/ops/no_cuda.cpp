#include "trainer/ops/cuda.h"

namespace corank::ops::cuda {
namespace {
[[noreturn]] void absent() {
  TORCH_CHECK(false, "this build has no CUDA kernels: configure with -DCORANK_CUDA=ON (preset gpu)");
}
}  // namespace

void dropout(const at::Tensor&, const at::Tensor&, const Dropout&) { absent(); }
std::pair<at::Tensor, at::Tensor> rms_norm_forward(const at::Tensor&, const at::Tensor&, double) { absent(); }
at::Tensor rms_norm_backward(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&) { absent(); }
at::Tensor rope(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, int) { absent(); }
at::Tensor swiglu_forward(const at::Tensor&, const at::Tensor&) { absent(); }
std::pair<at::Tensor, at::Tensor> swiglu_backward(const at::Tensor&, const at::Tensor&, const at::Tensor&) { absent(); }
void softmax_gradient(const at::Tensor&, const at::Tensor&, const at::Tensor&) { absent(); }
std::tuple<at::Tensor, at::Tensor, at::Tensor> softmax_statistics(const at::Tensor&, const at::Tensor&) { absent(); }
void scaled_low_rank_sum(const at::Tensor&, const at::Tensor&, const at::Tensor&, double, const at::Tensor&) {
  absent();
}
at::Tensor squared_row_norms(const std::vector<at::Tensor>&, const std::vector<at::Tensor>&,
                             const std::vector<at::Tensor>&, double) {
  absent();
}
std::tuple<at::Tensor, at::Tensor, at::Tensor> dora_gradients(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                              const at::Tensor&, const at::Tensor&) {
  absent();
}
at::Tensor mora_compress(const at::Tensor&, const Mora&) { absent(); }
at::Tensor mora_gather(const at::Tensor&, const Mora&) { absent(); }
void mora_add_decompressed(const at::Tensor&, const at::Tensor&, const Mora&) { absent(); }
void mora_add_expanded(const at::Tensor&, const at::Tensor&, const Mora&) { absent(); }
void nf4_dequantise(const Nf4&, const at::Tensor&) { absent(); }
int64_t peak_memory_bytes() { absent(); }
void reset_peak_memory() { absent(); }
void synchronize() { absent(); }

}  // namespace corank::ops::cuda
