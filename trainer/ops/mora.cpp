#include "trainer/ops/mora.h"

#include <algorithm>
#include <cmath>

#include "trainer/ops/cuda.h"
#include "trainer/ops/matmul.h"

namespace corank::ops {
namespace {

constexpr int64_t kRowsOfPart = 12288;  // measured on one H100

int64_t blocks_of(int64_t size, int64_t r) { return (size + r - 1) / r; }

/// A rank's columns at their places among `width` columns, zeros elsewhere; with `wrap`, columns 0, 1, ... stand again
/// behind the last of all ranks, as far as `width` reaches.
at::Tensor place(const at::Tensor& x_NL, const Extent& extent, int64_t width, bool wrap) {
  if (extent.length == width) return x_NL;
  at::Tensor all = at::zeros({x_NL.size(0), width}, x_NL.options());
  all.narrow(1, extent.start, extent.length).copy_(x_NL);
  const int64_t again = wrap ? std::clamp<int64_t>(width - extent.size - extent.start, 0, extent.length) : 0;
  if (again > 0) all.narrow(1, extent.size + extent.start, again).copy_(x_NL.narrow(1, 0, again));
  return all;
}

/// The adjoint: a rank's columns of `all`, plus what stands behind the last.
at::Tensor unplace(const at::Tensor& all, const Extent& extent, bool wrap) {
  const at::Tensor x_NL = all.narrow(1, extent.start, extent.length);
  const int64_t again = wrap ? std::clamp<int64_t>(all.size(1) - extent.size - extent.start, 0, extent.length) : 0;
  if (again == 0) return x_NL;
  at::Tensor sum = x_NL.clone();
  sum.narrow(1, 0, again).add_(all.narrow(1, extent.size + extent.start, again));
  return sum;
}

/// R sums over the groups of a rank's features.
at::Tensor sum_groups(const at::Tensor& x_NL, const Extent& extent, Grouping grouping, int64_t r, bool wrap) {
  const int64_t n = x_NL.size(0);
  if (grouping == Grouping::modulo) {
    return place(x_NL, extent, blocks_of(extent.size, r) * r, wrap).view({n, -1, r}).sum(1);
  }
  const at::Tensor all = place(x_NL, extent, extent.size, false);
  const int64_t length = extent.size / r, longer = extent.size % r, cut = longer * (length + 1);
  const at::Tensor first = all.narrow(1, 0, cut).unflatten(1, {longer, length + 1}).sum(2);
  return at::cat({first, all.narrow(1, cut, extent.size - cut).unflatten(1, {r - longer, length}).sum(2)}, 1);
}

/// The adjoint: every feature of the rank gets its group's value.
at::Tensor spread_groups(const at::Tensor& c_NR, const Extent& extent, Grouping grouping, bool wrap) {
  const int64_t n = c_NR.size(0), r = c_NR.size(1);
  if (grouping == Grouping::modulo) {
    return unplace(c_NR.repeat({1, blocks_of(extent.size, r)}), extent, wrap);
  }
  const int64_t length = extent.size / r, longer = extent.size % r;
  const auto run = [&](int64_t begin, int64_t count, int64_t times) {
    return c_NR.narrow(1, begin, count).unsqueeze(2).expand({n, count, times}).reshape({n, count * times});
  };
  const at::Tensor all = at::cat({run(0, longer, length + 1), run(longer, r - longer, length)}, 1);
  return all.narrow(1, extent.start, extent.length);
}

/// Block b of x_NBR turned by b times the angles 10000^(-2 l / R), halves paired as in Llama's rotary positions;
/// direction -1: back.
at::Tensor rotate_blocks(const at::Tensor& x_NBR, const Rotation& by, int direction) {
  const int64_t half = x_NBR.size(2) / 2;
  const at::Tensor a = x_NBR.narrow(2, 0, half), c = x_NBR.narrow(2, half, half), sin_BH = by.sin_BH * direction;
  return at::cat({a * by.cos_BH - c * sin_BH, c * by.cos_BH + a * sin_BH}, 2);
}

bool has_mora_kernel(const at::Tensor& x) { return x.is_cuda() && cuda::has_kernel(x); }

/// Outputs p of all ranks read value p mod `period`.
at::Tensor repeated(const at::Tensor& z_NP, const Extent& out) {
  return z_NP.repeat({1, blocks_of(out.size, z_NP.size(1))}).narrow(1, out.start, out.length);
}

/// The group of one of `size` features; see Grouping.
int64_t group_of(int64_t index, int64_t size, int64_t r, Grouping grouping) {
  if (grouping == Grouping::modulo) return index % r;
  const int64_t length = size / r, longer = size % r, cut = longer * (length + 1);
  return index < cut ? index / (length + 1) : longer + (index - cut) / length;
}

/// The group of each of `size` features.
at::Tensor groups(int64_t size, int64_t r, Grouping grouping, at::Device device) {
  std::vector<int64_t> group(static_cast<size_t>(size));
  for (int64_t j = 0; j < size; ++j) group[static_cast<size_t>(j)] = group_of(j, size, r, grouping);
  return at::tensor(group, at::kLong).to(device);
}

/// The matrix after the turn of block b: entry [i, l] is M[i, l] cos + M[i, l + R/2] sin in the first half of the
/// columns and M[i, l] cos - M[i, l - R/2] sin in the second.
at::Tensor turned_matrix(const at::Tensor& m_RR, int64_t b) {
  const int64_t half = m_RR.size(0) / 2;
  std::vector<float> cos, sin;
  for (int64_t l = 0; l < half; ++l) {
    const float inverse = std::pow(10000.0F, -2.0F * static_cast<float>(l) / static_cast<float>(2 * half));
    cos.push_back(std::cos(static_cast<float>(b) * inverse));
    sin.push_back(std::sin(static_cast<float>(b) * inverse));
  }
  const at::Tensor cos_H = at::tensor(cos).to(m_RR), sin_H = at::tensor(sin).to(m_RR);
  const at::Tensor first = m_RR.narrow(1, 0, half), second = m_RR.narrow(1, half, half);
  return at::cat({first * cos_H + second * sin_H, second * cos_H - first * sin_H}, 1);
}

/// Output p of block b = p / R reads that block's inputs; behind the last input the first stand again, and outputs
/// beyond all blocks repeat them.
at::Tensor rotation_delta(const at::Tensor& m_RR, int64_t in, int64_t out) {
  const int64_t r = m_RR.size(0), period = blocks_of(in, r) * r;
  at::Tensor delta_OI = at::zeros({out, in}, m_RR.options());
  for (int64_t p = 0; p < out; p += r) {
    const int64_t begin = p % period, rows = std::min(r, out - p), before_end = std::min(r, in - begin);
    const at::Tensor turned = turned_matrix(m_RR, begin / r).narrow(0, 0, rows);
    const at::Tensor block_OI = delta_OI.narrow(0, p, rows);
    block_OI.narrow(1, begin, before_end).add_(turned.narrow(1, 0, before_end));
    block_OI.narrow(1, 0, r - before_end).add_(turned.narrow(1, before_end, r - before_end));
  }
  return delta_OI;
}

}  // namespace

int64_t Mora::blocks() const {
  if (compress != Grouping::rotate) return 1;
  return std::min(blocks_of(in.size, side()), blocks_of(out.size, side()));
}

Rotation rotation_of(int64_t r, int64_t in, int64_t out, const at::TensorOptions& options) {
  const auto wide = options.dtype(at::kFloat);
  const at::Tensor inverse = at::pow(10000.0, at::arange(r / 2, wide).mul_(2).div_(static_cast<double>(r)).neg_());
  const at::Tensor angles = at::outer(at::arange(std::min(blocks_of(in, r), blocks_of(out, r)), wide), inverse);
  return {angles.cos().to(options.dtype()), angles.sin().to(options.dtype())};
}

at::Tensor mora_compress(const at::Tensor& x_NL, const Mora& s) {
  if (has_mora_kernel(x_NL)) return cuda::mora_compress(x_NL, s);
  const int64_t r = s.side();
  if (s.compress != Grouping::rotate) return sum_groups(x_NL, s.in, s.compress, r, /*wrap=*/true);
  const at::Tensor placed = place(x_NL, s.in, blocks_of(s.in.size, r) * r, /*wrap=*/true);
  return rotate_blocks(placed.narrow(1, 0, s.blocks() * r).unflatten(1, {-1, r}), s.rotation, 1);
}

void mora_add_decompressed(at::Tensor& y_NL, const at::Tensor& z, const Mora& s) {
  if (has_mora_kernel(y_NL)) return cuda::mora_add_decompressed(y_NL, z, s);
  y_NL.add_(s.decompress == Grouping::rotate ? repeated(z.flatten(1), s.out)
                                             : spread_groups(z, s.out, s.decompress, /*wrap=*/false));
}

at::Tensor mora_gather(const at::Tensor& g_NL, const at::Tensor& like, const Mora& s) {
  if (has_mora_kernel(g_NL)) return cuda::mora_gather(g_NL, s);
  if (s.decompress != Grouping::rotate) return sum_groups(g_NL, s.out, s.decompress, like.size(1), /*wrap=*/false);
  const int64_t period = like.size(1) * like.size(2);
  return sum_groups(g_NL, s.out, Grouping::modulo, period, /*wrap=*/false).view_as(like);
}

void mora_add_expanded(at::Tensor& dx_NL, const at::Tensor& dc, const Mora& s) {
  if (has_mora_kernel(dx_NL)) return cuda::mora_add_expanded(dx_NL, dc, s);
  if (s.compress != Grouping::rotate) {
    dx_NL.add_(spread_groups(dc, s.in, s.compress, /*wrap=*/true));
    return;
  }
  const int64_t unused = blocks_of(s.in.size, s.side()) - s.blocks();
  const at::Tensor all = at::constant_pad_nd(rotate_blocks(dc, s.rotation, -1).flatten(1), {0, unused * s.side()});
  dx_NL.add_(unplace(all, s.in, /*wrap=*/true));
}

at::Tensor mora_padded(const at::Tensor& m_RR) {
  const int64_t missing = has_mora_kernel(m_RR) ? (8 - m_RR.size(0) % 8) % 8 : 0;
  return missing == 0 ? m_RR : at::constant_pad_nd(m_RR, {0, missing, 0, missing});
}

at::Tensor mora_through(const at::Tensor& c, const at::Tensor& m) {
  return at::mm(c.flatten(0, -2), m).view(c.sizes());
}

// On matrix units over parts of the rows and then summed: one product of so many rows and so small a result leaves
// most of a GPU idle.
at::Tensor mora_square_gradient(const at::Tensor& dz, const at::Tensor& c, at::ScalarType dtype) {
  const at::Tensor dz_XP = dz.flatten(0, -2), c_XP = c.flatten(0, -2);
  const int64_t rows = c_XP.size(0), pitch = c_XP.size(1);
  int64_t parts = cuda::on_matrix_units(c) ? std::max<int64_t>(1, rows / kRowsOfPart) : 1;
  while (rows % parts != 0) --parts;
  if (parts == 1) return matmul_to(dz_XP.t(), c_XP, dtype);
  const std::vector<int64_t> split{parts, rows / parts, pitch};
  return at::bmm(dz_XP.view(split).transpose(1, 2), c_XP.view(split), dtype).sum(0);
}

at::Tensor mora_delta(const at::Tensor& m_RR, Grouping compress, Grouping decompress, int64_t in, int64_t out) {
  if (compress == Grouping::rotate) return rotation_delta(m_RR, in, out);
  const int64_t r = m_RR.size(0);
  const at::Tensor rows_OR = m_RR.index_select(0, groups(out, r, decompress, m_RR.device()));
  const at::Tensor delta_OI = rows_OR.index_select(1, groups(in, r, compress, m_RR.device()));
  // Modulo, the first inputs stand again behind the last, in the groups that follow.
  const int64_t again = compress == Grouping::modulo ? blocks_of(in, r) * r - in : 0;
  if (again > 0) delta_OI.narrow(1, 0, again).add_(rows_OR.narrow(1, in % r, again));
  return delta_OI;
}

}  // namespace corank::ops
