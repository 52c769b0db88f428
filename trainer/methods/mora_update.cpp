#include "trainer/methods/mora_update.h"

namespace corank {

MoraUpdate::MoraUpdate(ops::Mora square) : s_(std::move(square)), padded_(ops::mora_padded(s_.m_RR.value)) {}

at::Tensor MoraUpdate::forward(const at::Tensor& x_NI, const Matrix& w, const at::Tensor& bias_O,
                               std::vector<at::Tensor>& saved) const {
  const at::Tensor c = ops::mora_compress(ops::dropout(x_NI, s_.dropout), s_);
  saved.push_back(c);
  at::Tensor y_NO = w.multiply(x_NI, bias_O);
  ops::mora_add_decompressed(y_NO, ops::mora_through(c, padded_.t()), s_);
  return y_NO;
}

void MoraUpdate::backward(const at::Tensor& g_NO, const at::Tensor& x_NI, const Matrix& w,
                          const std::vector<at::Tensor>& saved, const InputGradient& dx) const {
  const at::Tensor& c = saved[0];
  const at::Tensor dz = ops::mora_gather(g_NO, c, s_);
  const at::Tensor dm = ops::mora_square_gradient(dz, c, s_.m_RR.leaf.scalar_type());
  ops::add_gradient(s_.m_RR.leaf, dm.narrow(0, 0, s_.side()).narrow(1, 0, s_.side()));
  if (!dx.needed()) return;
  w.multiply_transposed(g_NO, dx.dx_NI, dx.write);
  at::Tensor sum_NI = dx.dx_NI;
  const at::Tensor dc = ops::mora_through(dz, padded_);
  if (!s_.dropout.active()) return ops::mora_add_expanded(sum_NI, dc, s_);
  at::Tensor behind_NI = at::zeros_like(x_NI);
  ops::mora_add_expanded(behind_NI, dc, s_);
  sum_NI.add_(ops::dropout(behind_NI, s_.dropout));
}

}  // namespace corank
