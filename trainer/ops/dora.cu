#include <mma.h>

#include "trainer/ops/cuda_common.cuh"

namespace corank::ops::cuda {
namespace {

constexpr int kThreads = 256;

// ---- q = gamma (q + scale u B^T). A block makes one tile; tensor cores make the product of one depth after another.
constexpr int kTileRows = 64, kTileColumns = 128, kDepth = 16;
constexpr int kFactorStride = kDepth + 8, kSumStride = kTileColumns + 4;  // padded against bank conflicts

namespace wmma = nvcuda::wmma;
using Factor = __nv_bfloat16;

/// A warp's 16 rows and 64 columns of a block's tile, the product of a factor by rows and another by columns.
struct WarpTile {
  int row = threadIdx.x / 32 % 4 * 16, column = threadIdx.x / 128 * 64;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sums[4];

  __device__ WarpTile() {
#pragma unroll
    for (auto& sum : sums) wmma::fill_fragment(sum, 0);
  }

  /// Adds the product of one depth. `right` is where this warp's columns begin, 16 of them `step` elements apart.
  template <class Layout>
  __device__ void add(const Factor* left_tile, const Factor* right, int step, int stride) {
    wmma::fragment<wmma::matrix_a, 16, 16, 16, Factor, wmma::row_major> a;
    wmma::load_matrix_sync(a, left_tile + row * kFactorStride, kFactorStride);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      wmma::fragment<wmma::matrix_b, 16, 16, 16, Factor, Layout> b;
      wmma::load_matrix_sync(b, right + i * step, stride);
      wmma::mma_sync(sums[i], a, b, sums[i]);
    }
  }

  __device__ void store(float* tile) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      wmma::store_matrix_sync(tile + row * kSumStride + column + 16 * i, sums[i], kSumStride, wmma::mem_row_major);
    }
  }
};

/// Rows [first, first + Rows) and depths [depth, depth + kDepth) of a [count, r] factor; zeros beyond it. r % 8 == 0.
template <int Rows>
__device__ void stage(Factor* tile, const Factor* __restrict__ factor, int64_t first, int64_t count, int depth, int r) {
  constexpr int kPacks = kDepth / 8;
  for (int i = threadIdx.x; i < Rows * kPacks; i += kThreads) {
    const int row = i / kPacks, column = i % kPacks * 8;
    Pack<Factor, 8> pack{};
    if (first + row < count && depth + column < r) {
      pack = load<8>(factor, ((first + row) * r + depth + column) / 8);
    }
    store<8>(tile, (row * kFactorStride + column) / 8, pack);
  }
}

template <int W>
__global__ void __launch_bounds__(kThreads, 2)
    scaled_sum(Factor* __restrict__ q, const Factor* __restrict__ u, const Factor* __restrict__ b,
               const float* __restrict__ gamma, float scale, int64_t rows, int64_t width, int r) {
  __shared__ __align__(32) Factor u_tile[kTileRows * kFactorStride], b_tile[kTileColumns * kFactorStride];
  __shared__ __align__(32) float sums[kTileRows * kSumStride];
  const int64_t first_row = int64_t{blockIdx.x} * kTileRows, first_column = int64_t{blockIdx.y} * kTileColumns;

  constexpr int kPacks = kTileColumns / W, kMine = kTileRows * kPacks / kThreads;
  Pack<Factor, W> mine[kMine];  // read while the product is made
  const auto place_of = [&](int i, int& row, int& column) {
    row = (threadIdx.x + i * kThreads) / kPacks;
    column = (threadIdx.x + i * kThreads) % kPacks * W;
    return first_row + row < rows && first_column + column < width
               ? ((first_row + row) * width + first_column + column) / W
               : int64_t{-1};
  };
  int row, column;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int64_t place = place_of(i, row, column);
    if (place >= 0) mine[i] = load<W>(q, place);
  }

  WarpTile part;
  for (int depth = 0; depth < r; depth += kDepth) {
    stage<kTileRows>(u_tile, u, first_row, rows, depth, r);
    stage<kTileColumns>(b_tile, b, first_column, width, depth, r);
    __syncthreads();
    part.add<wmma::col_major>(u_tile, b_tile + part.column * kFactorStride, 16 * kFactorStride, kFactorStride);
    __syncthreads();
  }
  part.store(sums);
  __syncthreads();

#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int64_t place = place_of(i, row, column);
    if (place < 0) continue;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const float value = static_cast<float>(mine[i].v[j]) + scale * sums[row * kSumStride + column + j];
      mine[i].v[j] = static_cast<Factor>(gamma[first_column + column + j] * value);
    }
    store<W>(q, place, mine[i]);
  }
}

// ---- Squares of the rows of W + scale B A. A block sums over kTilesOfBlock tiles of its rows; its sums are a part of
// a row of `partial` [members, blocks of columns, rows].
constexpr int kTilesOfBlock = 4, kInputStride = kTileColumns + 8;

struct Updated {
  const Factor *w[kMostRowNorms], *a[kMostRowNorms], *b[kMostRowNorms];
};

/// sum += the squares of w + scale low.
__device__ void add_squares(float& sum, const Pack<Factor, 8>& w, const float* low, float scale) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float value = static_cast<float>(w.v[j]) + scale * low[j];
    sum += value * value;
  }
}

/// Over `lanes` threads of a warp that stand side by side.
template <int lanes>
__device__ float sum_of_neighbours(float value) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  }
  return value;
}

__global__ void __launch_bounds__(kThreads, 2)
    squared_rows(Updated updated, float scale, float* __restrict__ partial, int64_t rows, int64_t width, int r) {
  const Factor *__restrict__ w = updated.w[blockIdx.z], *__restrict__ a = updated.a[blockIdx.z],
               *__restrict__ b = updated.b[blockIdx.z];
  constexpr int kPacks = kTileColumns / 8, kMine = kTileRows * kPacks / kThreads;
  __shared__ __align__(32) Factor b_tile[kTileRows * kFactorStride], a_tile[kDepth * kInputStride];
  __shared__ __align__(32) float sums[kTileRows * kSumStride];
  const int64_t first_row = int64_t{blockIdx.x} * kTileRows;
  const int my_row = threadIdx.x / kPacks, my_column = threadIdx.x % kPacks * 8;  // and every 16th row below
  const int64_t first_column = int64_t{blockIdx.y} * kTilesOfBlock * kTileColumns + my_column;
  const auto column_of = [&](int tile) { return first_column + int64_t{tile} * kTileColumns; };
  float squares[kMine] = {};
  Pack<Factor, 8> next[kMine];
  const auto read = [&](int tile) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int64_t row = first_row + my_row + i * (kThreads / kPacks);
      const bool inside = tile < kTilesOfBlock && column_of(tile) < width && row < rows;
      next[i] = inside ? load<8>(w, (row * width + column_of(tile)) / 8) : Pack<Factor, 8>{};
    }
  };
  read(0);
  for (int tile = 0; tile < kTilesOfBlock; ++tile) {
    if (column_of(tile) - my_column >= width) break;
    const bool inside = column_of(tile) < width;
    Pack<Factor, 8> mine[kMine];
#pragma unroll
    for (int i = 0; i < kMine; ++i) mine[i] = next[i];
    read(tile + 1);  // while the product is made
    WarpTile part;
    for (int depth = 0; depth < r; depth += kDepth) {
      stage<kTileRows>(b_tile, b, first_row, rows, depth, r);
      const Pack<Factor, 8> inputs = inside && depth + my_row < r
                                         ? load<8>(a, ((depth + my_row) * width + column_of(tile)) / 8)
                                         : Pack<Factor, 8>{};
      store<8>(a_tile, (my_row * kInputStride + my_column) / 8, inputs);
      __syncthreads();
      part.add<wmma::row_major>(b_tile, a_tile + part.column, 16, kInputStride);
      __syncthreads();
    }
    part.store(sums);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      add_squares(squares[i], mine[i], sums + (my_row + i * (kThreads / kPacks)) * kSumStride + my_column, scale);
    }
  }
  static_assert(kPacks == 16 && kThreads / kPacks == kDepth);
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const float sum = sum_of_neighbours<kPacks>(squares[i]);
    const int64_t row = first_row + my_row + i * (kThreads / kPacks);
    if (threadIdx.x % kPacks == 0 && row < rows) {
      partial[(int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * rows + row] = sum;
    }
  }
}

// ---- h = gamma g, column sums of g z, and h^T u. A block takes a strip of kStripRows rows of one tile of columns; its
// sums are a row of `dots` [strips, width] and a part of `products` [strips, padded width, padded r].
constexpr int kStripRows = 256, kMostStripes = 16;
constexpr int kSharedBytes = kStripRows * (kInputStride + kFactorStride) * int{sizeof(Factor)} +
                             kMostStripes * kTileColumns * int{sizeof(float)};

/// h of a strip, in memory and in `h_tile`, with zeros beyond the tensor; `of_stripe`: the threads' sums of g z.
template <int W>
__device__ void scale_strip(const Factor* __restrict__ g, const Factor* __restrict__ z, const float* __restrict__ gamma,
                            Factor* __restrict__ h, Factor* h_tile, float* of_stripe, int64_t first_row,
                            int64_t first_column, int64_t rows, int64_t width) {
  constexpr int kPacks = kTileColumns / W, kStripes = kThreads / kPacks;
  constexpr int kAtOnce = 4;  // rows whose reads are under way together
  const int my_column = threadIdx.x % kPacks * W, stripe = threadIdx.x / kPacks;
  const bool inside = first_column + my_column < width;
  float sums[W] = {}, factors[W] = {};
#pragma unroll
  for (int j = 0; j < W; ++j) factors[j] = inside ? gamma[first_column + my_column + j] : 0;
  for (int base = stripe; base < kStripRows; base += kAtOnce * kStripes) {
    Pack<Factor, W> gs[kAtOnce], zs[kAtOnce];
    const auto place_of = [&](int i) {
      const int64_t row = first_row + base + i * kStripes;
      return inside && row < rows ? (row * width + first_column + my_column) / W : int64_t{-1};
    };
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t place = place_of(i);
      gs[i] = place >= 0 ? load<W>(g, place) : Pack<Factor, W>{};
      zs[i] = place >= 0 ? load<W>(z, place) : Pack<Factor, W>{};
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int j = 0; j < W; ++j) {
        const auto value = static_cast<float>(gs[i].v[j]);
        sums[j] += value * static_cast<float>(zs[i].v[j]);
        gs[i].v[j] = static_cast<Factor>(value * factors[j]);
      }
      const int64_t place = place_of(i);
      if (place >= 0) store<W>(h, place, gs[i]);
      store<W>(h_tile, ((base + i * kStripes) * kInputStride + my_column) / W, gs[i]);
    }
  }
#pragma unroll
  for (int j = 0; j < W; ++j) of_stripe[stripe * kTileColumns + my_column + j] = sums[j];
}

/// h^T u of a strip, 16 columns a warp. `product`: where this warp's columns begin.
__device__ void multiply_strip(const Factor* h_tile, Factor* u_tile, const Factor* __restrict__ u,
                               float* __restrict__ product, int64_t first_row, int64_t rows, int r, int padded_r) {
  static_assert(kThreads / 32 * 16 == kTileColumns);
  const int warp_column = threadIdx.x / 32 * 16;
  for (int rank = 0; rank < r; rank += kDepth) {
    stage<kStripRows>(u_tile, u, first_row, rows, rank, r);
    __syncthreads();
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
    wmma::fill_fragment(sum, 0);
#pragma unroll 4
    for (int row = 0; row < kStripRows; row += kDepth) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, Factor, wmma::col_major> turned;
      wmma::fragment<wmma::matrix_b, 16, 16, 16, Factor, wmma::row_major> inputs;
      wmma::load_matrix_sync(turned, h_tile + row * kInputStride + warp_column, kInputStride);
      wmma::load_matrix_sync(inputs, u_tile + row * kFactorStride, kFactorStride);
      wmma::mma_sync(sum, turned, inputs, sum);
    }
    wmma::store_matrix_sync(product + rank, sum, padded_r, wmma::mem_row_major);
    __syncthreads();
  }
}

template <int W>
__global__ void __launch_bounds__(kThreads, 2)
    scale_and_reduce(const Factor* __restrict__ g, const Factor* __restrict__ z, const Factor* __restrict__ u,
                     const float* __restrict__ gamma, Factor* __restrict__ h, float* __restrict__ dots,
                     float* __restrict__ products, int64_t rows, int64_t width, int r) {
  constexpr int kStripes = kThreads * W / kTileColumns;
  static_assert(kStripes <= kMostStripes);
  extern __shared__ __align__(32) Factor shared[];
  Factor *h_tile = shared, *u_tile = h_tile + kStripRows * kInputStride;
  float* of_stripe = reinterpret_cast<float*>(u_tile + kStripRows * kFactorStride);
  const int64_t first_column = int64_t{blockIdx.x} * kTileColumns, first_row = int64_t{blockIdx.y} * kStripRows;

  scale_strip<W>(g, z, gamma, h, h_tile, of_stripe, first_row, first_column, rows, width);
  __syncthreads();
  const int64_t column = first_column + threadIdx.x;
  if (threadIdx.x < kTileColumns && column < width) {
    float sum = 0;
#pragma unroll
    for (int s = 0; s < kStripes; ++s) sum += of_stripe[s * kTileColumns + threadIdx.x];
    dots[blockIdx.y * width + column] = sum;
  }
  const int padded_r = (r + kDepth - 1) / kDepth * kDepth;
  const int64_t warp_row = int64_t{blockIdx.y} * gridDim.x * kTileColumns + first_column + threadIdx.x / 32 * 16;
  multiply_strip(h_tile, u_tile, u, products + warp_row * padded_r, first_row, rows, r, padded_r);
}

/// sum = factor (the rows of `partial` one after another); without `factor`, their sum.
__global__ void __launch_bounds__(kThreads)
    sum_rows(const float* __restrict__ partial, const float* __restrict__ factor, float* __restrict__ sum, int64_t rows,
             int64_t width) {
  const int64_t column = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (column >= width) return;
  float total = 0;
#pragma unroll 8
  for (int64_t row = 0; row < rows; ++row) total += partial[row * width + column];
  sum[column] = factor ? factor[column] * total : total;
}

unsigned second_grid_size(int64_t blocks) {
  TORCH_CHECK(blocks <= 65535, "no CUDA grid has ", blocks, " blocks in its second dimension");
  return static_cast<unsigned>(blocks);
}

at::Tensor summed_rows(const at::Tensor& partial_PX, const at::Tensor& factor_X) {
  const int64_t width = partial_PX.size(1);
  at::Tensor sum_X = at::empty({width}, partial_PX.options());
  sum_rows<<<grid_size(ceil_div(width, kThreads)), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      partial_PX.const_data_ptr<float>(), factor_X.defined() ? factor_X.const_data_ptr<float>() : nullptr,
      sum_X.mutable_data_ptr<float>(), partial_PX.size(0), width);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return sum_X;
}

Factor* factors_of(const at::Tensor& t) { return static_cast<Factor*>(t.data_ptr()); }

}  // namespace

void scaled_low_rank_sum(const at::Tensor& q_NO, const at::Tensor& u_NR, const at::Tensor& b_OR, double scale,
                         const at::Tensor& gamma_O) {
  const int64_t rows = q_NO.size(0), width = q_NO.size(1), r = u_NR.size(1);
  require(q_NO, at::kBFloat16, rows * width, "scaled_low_rank_sum q");
  require(u_NR, at::kBFloat16, rows * r, "scaled_low_rank_sum u");
  require(b_OR, at::kBFloat16, width * r, "scaled_low_rank_sum B");
  require(gamma_O, at::kFloat, width, "scaled_low_rank_sum gamma");
  TORCH_CHECK(r % 8 == 0 && has_packs<at::BFloat16>(r, {u_NR, b_OR}), "scaled_low_rank_sum: rank ", r,
              " is not a multiple of 8, or the factors do not begin at 16 bytes");
  if (q_NO.numel() == 0) return;
  const dim3 grid(grid_size(ceil_div(rows, kTileRows)), second_grid_size(ceil_div(width, kTileColumns)));
  const auto run = [&](auto wide) {
    scaled_sum<decltype(wide)::value><<<grid, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        factors_of(q_NO), factors_of(u_NR), factors_of(b_OR), gamma_O.const_data_ptr<float>(),
        static_cast<float>(scale), rows, width, static_cast<int>(r));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  has_packs<at::BFloat16>(width, q_NO) ? run(std::integral_constant<int, 8>{}) : run(std::integral_constant<int, 1>{});
}

at::Tensor squared_row_norms(const std::vector<at::Tensor>& w_OI, const std::vector<at::Tensor>& a_RI,
                             const std::vector<at::Tensor>& b_OR, double scale) {
  const auto members = static_cast<int64_t>(w_OI.size());
  const int64_t rows = w_OI.at(0).size(0), width = w_OI[0].size(1), r = a_RI.at(0).size(0);
  TORCH_CHECK(w_OI.size() <= kMostRowNorms && a_RI.size() == w_OI.size() && b_OR.size() == w_OI.size(),
              "squared_row_norms: ", members, " weights");
  TORCH_CHECK(r % 8 == 0 && has_packs<at::BFloat16>(r, b_OR) && has_packs<at::BFloat16>(width, w_OI) &&
                  has_packs<at::BFloat16>(width, a_RI),
              "squared_row_norms: rank ", r, " or width ", width,
              " is not a multiple of 8, or a tensor does not begin at 16 bytes");
  Updated updated{};
  for (size_t i = 0; i < w_OI.size(); ++i) {
    require(w_OI[i], at::kBFloat16, rows * width, "squared_row_norms W");
    require(a_RI[i], at::kBFloat16, r * width, "squared_row_norms A");
    require(b_OR[i], at::kBFloat16, rows * r, "squared_row_norms B");
    updated.w[i] = factors_of(w_OI[i]);
    updated.a[i] = factors_of(a_RI[i]);
    updated.b[i] = factors_of(b_OR[i]);
  }
  const int64_t parts = ceil_div(width, int64_t{kTilesOfBlock} * kTileColumns);
  at::Tensor partial = at::empty({members, parts, rows}, w_OI[0].options().dtype(at::kFloat));
  const dim3 grid(grid_size(ceil_div(rows, kTileRows)), second_grid_size(parts), second_grid_size(members));
  squared_rows<<<grid, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      updated, static_cast<float>(scale), partial.mutable_data_ptr<float>(), rows, width, static_cast<int>(r));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return partial.sum(1);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> dora_gradients(const at::Tensor& g_NO, const at::Tensor& z_NO,
                                                              const at::Tensor& u_NR, const at::Tensor& gamma_O,
                                                              const at::Tensor& factor_O) {
  const int64_t rows = g_NO.size(0), width = g_NO.size(1), r = u_NR.size(1);
  require(g_NO, at::kBFloat16, rows * width, "dora_gradients g");
  require(z_NO, at::kBFloat16, rows * width, "dora_gradients z");
  require(u_NR, at::kBFloat16, rows * r, "dora_gradients u");
  require(gamma_O, at::kFloat, width, "dora_gradients gamma");
  require(factor_O, at::kFloat, width, "dora_gradients factor");
  TORCH_CHECK(r % 8 == 0 && has_packs<at::BFloat16>(r, u_NR), "dora_gradients: rank ", r,
              " is not a multiple of 8, or u does not begin at 16 bytes");
  at::Tensor h_NO = at::empty_like(g_NO);
  if (g_NO.numel() == 0) return {h_NO, at::zeros_like(gamma_O), at::zeros({width, r}, gamma_O.options())};
  const int64_t strips = ceil_div(rows, kStripRows), tiles = ceil_div(width, kTileColumns);
  const int64_t padded_width = tiles * kTileColumns, padded_r = ceil_div(r, kDepth) * kDepth;
  at::Tensor dots = at::empty({strips, width}, gamma_O.options());
  at::Tensor products = at::empty({strips, padded_width * padded_r}, gamma_O.options());
  const auto run = [&](auto wide) {
    const auto kernel = &scale_and_reduce<decltype(wide)::value>;
    C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    kernel<<<dim3(grid_size(tiles), second_grid_size(strips)), kThreads, kSharedBytes,
             c10::cuda::getCurrentCUDAStream()>>>(
        factors_of(g_NO), factors_of(z_NO), factors_of(u_NR), gamma_O.const_data_ptr<float>(), factors_of(h_NO),
        dots.mutable_data_ptr<float>(), products.mutable_data_ptr<float>(), rows, width, static_cast<int>(r));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  has_packs<at::BFloat16>(width, {g_NO, z_NO, h_NO}) ? run(std::integral_constant<int, 8>{})
                                                     : run(std::integral_constant<int, 1>{});
  const at::Tensor hu_OR = summed_rows(products, {}).view({padded_width, padded_r});
  return {h_NO, summed_rows(dots, factor_O), hu_OR.narrow(0, 0, width).narrow(1, 0, r)};
}

}  // namespace corank::ops::cuda
