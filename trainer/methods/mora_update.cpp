#include "trainer/methods/mora_update.h"

#include "trainer/ops/matmul.h"

namespace corank {

MoraUpdate::MoraUpdate(ops::Mora square) : s_(std::move(square)), padded_(ops::mora_padded(s_.m_RR.value)) {}

at::Tensor MoraUpdate::forward(const at::Tensor& x_NI, const Matrix& w, const at::Tensor& bias_O,
                               std::vector<at::Tensor>& saved) const {
  const at::Tensor c = ops::mora_compress(ops::dropout(x_NI, s_.dropout), s_);
  saved.push_back(c);
  at::Tensor y_NO = ops::affine(x_NI, w.dense_OI(), bias_O);
  ops::mora_add_decompressed(y_NO, ops::mora_through(c, padded_.t()), s_);
  return y_NO;
}

std::vector<at::Tensor> MoraUpdate::backward(const at::Tensor& g_NO, const at::Tensor& x_NI, const Matrix& w,
                                             const std::vector<at::Tensor>& saved, bool needs_dx,
                                             at::Tensor& dx_NI) const {
  const at::Tensor& c = saved[0];
  const at::Tensor dz = ops::mora_gather(g_NO, c, s_);
  const at::Tensor dm = ops::mora_square_gradient(dz, c, s_.m_RR.leaf.scalar_type());
  const at::Tensor dm_RR = dm.narrow(0, 0, s_.side()).narrow(1, 0, s_.side());
  if (!needs_dx) return {dm_RR};
  ops::add_product(dx_NI, g_NO, w.dense_OI());
  const at::Tensor dc = ops::mora_through(dz, padded_);
  if (!s_.dropout.active()) {
    ops::mora_add_expanded(dx_NI, dc, s_);
  } else {
    at::Tensor behind_NI = at::zeros_like(x_NI);
    ops::mora_add_expanded(behind_NI, dc, s_);
    dx_NI.add_(ops::dropout(behind_NI, s_.dropout));
  }
  return {dm_RR};
}

}  // namespace corank
