#pragma once
#include <ATen/ATen.h>

#include <tuple>
#include <utility>
#include <vector>

#include "trainer/ops/dropout.h"
#include "trainer/ops/mora.h"
#include "trainer/ops/quantize.h"

/// The CUDA kernels behind the ops. Every tensor: CUDA, contiguous, float32 or bfloat16 (has_kernel); statistics and
/// arithmetic in float32; on the current stream. A CPU build has the same functions in no_cuda.cpp; they throw.
namespace corank::ops::cuda {

/// True if the kernels take x's dtype (float64 goes through ATen).
inline bool has_kernel(const at::Tensor& x) {
  return x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16;
}

/// True if products of x are made by matrix units with float32 sums, which read rows of 16 bytes.
inline bool on_matrix_units(const at::Tensor& x) { return x.is_cuda() && x.scalar_type() == at::kBFloat16; }

/// y = dropped and scaled x; both [N, I]. float64 too.
void dropout(const at::Tensor& x_NI, const at::Tensor& y_NI, const Dropout& dropout);

/// (y [N, D], rstd [N, 1] float32).
std::pair<at::Tensor, at::Tensor> rms_norm_forward(const at::Tensor& h_ND, const at::Tensor& weight_D, double eps);
/// dh [N, D]; the weight is frozen.
at::Tensor rms_norm_backward(const at::Tensor& grad_ND, const at::Tensor& h_ND, const at::Tensor& rstd_N1,
                             const at::Tensor& weight_D);

/// x turned by direction (1 or -1) times the angle of its position.
at::Tensor rope(const at::Tensor& x_NHd, const at::Tensor& cos_Td, const at::Tensor& sin_Td,
                const at::Tensor& positions_N, int direction);

at::Tensor swiglu_forward(const at::Tensor& gate_NF, const at::Tensor& up_NF);
/// (dgate, dup).
std::pair<at::Tensor, at::Tensor> swiglu_backward(const at::Tensor& grad_NF, const at::Tensor& gate_NF,
                                                  const at::Tensor& up_NF);

/// Overwrites logits [M, V] (float32 or bfloat16) with softmax(logits) - onehot(target), given each row's log-sum-exp.
/// A target outside [0, V) has no one. The plain form: exp(logits - lse) with 1 subtracted at the target.
void softmax_gradient(const at::Tensor& logits_MV, const at::Tensor& lse_M, const at::Tensor& targets_M);
/// (max [M], sum of exp(logits - max) [M], logit of the target or 0 where outside [M]), float32, in one pass.
std::tuple<at::Tensor, at::Tensor, at::Tensor> softmax_statistics(const at::Tensor& logits_MV,
                                                                  const at::Tensor& targets_M);

/// q = gamma (q + scale u B^T) in place; q [N, O], u [N, R], B [O, R] bfloat16, R a multiple of 8; gamma [O] float32.
/// One rounding.
void scaled_low_rank_sum(const at::Tensor& q_NO, const at::Tensor& u_NR, const at::Tensor& b_OR, double scale,
                         const at::Tensor& gamma_O);
/// Squares of the row norms of each W + scale B A [M, O] float32, of up to kMostRowNorms of one shape; W [O, I],
/// A [R, I], B [O, R] bfloat16, R and I multiples of 8.
constexpr size_t kMostRowNorms = 64;
at::Tensor squared_row_norms(const std::vector<at::Tensor>& w_OI, const std::vector<at::Tensor>& a_RI,
                             const std::vector<at::Tensor>& b_OR, double scale);
/// (h = gamma g [N, O], factor times the sum over N of g z [O], h^T u [O, R]) in one pass; g, z, u [N, R] and h
/// bfloat16, R a multiple of 8, the rest float32. The order of the sums is fixed.
std::tuple<at::Tensor, at::Tensor, at::Tensor> dora_gradients(const at::Tensor& g_NO, const at::Tensor& z_NO,
                                                              const at::Tensor& u_NR, const at::Tensor& gamma_O,
                                                              const at::Tensor& factor_O);

/// The maps of MoRA and their adjoints; x, g [N, this rank's features]. Compressed rows are [N, P] or, with rotation,
/// [N, blocks, P], with P the side of the matrix rounded up to a multiple of 8, zeros beyond the side. What is added to
/// `y` and `dx` in place is rounded once with it.
at::Tensor mora_compress(const at::Tensor& x_NL, const Mora& s);
at::Tensor mora_gather(const at::Tensor& g_NL, const Mora& s);
void mora_add_decompressed(const at::Tensor& y_NL, const at::Tensor& z, const Mora& s);
void mora_add_expanded(const at::Tensor& dx_NL, const at::Tensor& dc, const Mora& s);

/// Fills `out` (float32, float64 or bfloat16) with the weights.
void nf4_dequantise(const Nf4& w, const at::Tensor& out);

/// The caching allocator of the current device, and a wait for everything on it.
int64_t peak_memory_bytes();
void reset_peak_memory();
void synchronize();

}  // namespace corank::ops::cuda
