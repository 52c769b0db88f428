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
// a row of `partial`.
constexpr int kTilesOfBlock = 4, kInputStride = kTileColumns + 8;

__global__ void __launch_bounds__(kThreads, 2)
    squared_rows(const Factor* __restrict__ w, const Factor* __restrict__ a, const Factor* __restrict__ b, float scale,
                 float* __restrict__ partial, int64_t rows, int64_t width, int r) {
  constexpr int kPacks = kTileColumns / 8, kMine = kTileRows * kPacks / kThreads;
  __shared__ __align__(32) Factor b_tile[kTileRows * kFactorStride], a_tile[kDepth * kInputStride];
  __shared__ __align__(32) float sums[kTileRows * kSumStride];
  const int64_t first_row = int64_t{blockIdx.x} * kTileRows;
  const int my_row = threadIdx.x / kPacks, my_column = threadIdx.x % kPacks * 8;  // and every 16th row below
  float squares[kMine] = {};
  for (int tile = 0; tile < kTilesOfBlock; ++tile) {
    const int64_t first_column = (int64_t{blockIdx.y} * kTilesOfBlock + tile) * kTileColumns;
    if (first_column >= width) break;
    const bool inside = first_column + my_column < width;
    Pack<Factor, 8> mine[kMine];
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int64_t row = first_row + my_row + i * (kThreads / kPacks);
      mine[i] = inside && row < rows ? load<8>(w, (row * width + first_column + my_column) / 8) : Pack<Factor, 8>{};
    }
    WarpTile part;
    for (int depth = 0; depth < r; depth += kDepth) {
      stage<kTileRows>(b_tile, b, first_row, rows, depth, r);
      const Pack<Factor, 8> inputs = inside && depth + my_row < r
                                         ? load<8>(a, ((depth + my_row) * width + first_column + my_column) / 8)
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
      const float* low = sums + (my_row + i * (kThreads / kPacks)) * kSumStride + my_column;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float value = static_cast<float>(mine[i].v[j]) + scale * low[j];
        squares[i] += value * value;
      }
    }
  }
  static_assert(kPacks == 16 && kThreads / kPacks == kDepth);
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    for (int distance = kPacks / 2; distance > 0; distance /= 2) {
      squares[i] += __shfl_xor_sync(0xFFFFFFFFu, squares[i], distance);
    }
    const int64_t row = first_row + my_row + i * (kThreads / kPacks);
    if (threadIdx.x % kPacks == 0 && row < rows) partial[blockIdx.y * rows + row] = squares[i];
  }
}

// ---- (gamma g, column sums of g z). A block takes some rows of 32 packs of columns; its sums are one row of
// `partial`.
constexpr int kLanes = 32, kStripes = kThreads / kLanes, kRowsOfBlock = 256;

template <class T, int W>
__global__ void __launch_bounds__(kThreads)
    scale_and_dot(const T* __restrict__ g, const T* __restrict__ z, const float* __restrict__ gamma, T* __restrict__ h,
                  float* __restrict__ partial, int64_t rows, int64_t packs) {
  __shared__ float of_stripe[kStripes][kLanes * W];
  const int lane = threadIdx.x % kLanes, stripe = threadIdx.x / kLanes;
  const int64_t pack = int64_t{blockIdx.x} * kLanes + lane, begin = int64_t{blockIdx.y} * kRowsOfBlock;
  const int64_t end = begin + kRowsOfBlock < rows ? begin + kRowsOfBlock : rows;
  float dots[W] = {}, factors[W] = {};
  if (pack < packs) {
#pragma unroll
    for (int j = 0; j < W; ++j) factors[j] = gamma[pack * W + j];
#pragma unroll 4
    for (int64_t row = begin + stripe; row < end; row += kStripes) {
      const Pack<T, W> gs = load<W>(g, row * packs + pack), zs = load<W>(z, row * packs + pack);
      Pack<T, W> out;
#pragma unroll
      for (int j = 0; j < W; ++j) {
        dots[j] += static_cast<float>(gs.v[j]) * static_cast<float>(zs.v[j]);
        out.v[j] = static_cast<T>(static_cast<float>(gs.v[j]) * factors[j]);
      }
      store<W>(h, row * packs + pack, out);
    }
  }
#pragma unroll
  for (int j = 0; j < W; ++j) of_stripe[stripe][lane * W + j] = dots[j];
  __syncthreads();
  for (int i = threadIdx.x; i < kLanes * W; i += kThreads) {
    const int64_t column = int64_t{blockIdx.x} * kLanes * W + i;
    if (column >= packs * W) continue;
    float sum = 0;
#pragma unroll
    for (int s = 0; s < kStripes; ++s) sum += of_stripe[s][i];
    partial[blockIdx.y * packs * W + column] = sum;
  }
}

/// sum_O = factor (the rows of `partial` one after another).
__global__ void __launch_bounds__(kThreads)
    sum_rows(const float* __restrict__ partial, const float* __restrict__ factor, float* __restrict__ sum, int64_t rows,
             int64_t width) {
  const int64_t column = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (column >= width) return;
  float total = 0;
#pragma unroll 8
  for (int64_t row = 0; row < rows; ++row) total += partial[row * width + column];
  sum[column] = factor[column] * total;
}

unsigned second_grid_size(int64_t blocks) {
  TORCH_CHECK(blocks <= 65535, "no CUDA grid has ", blocks, " blocks in its second dimension");
  return static_cast<unsigned>(blocks);
}

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
  const auto data = [](const at::Tensor& t) { return static_cast<Factor*>(t.data_ptr()); };
  const auto run = [&](auto wide) {
    scaled_sum<decltype(wide)::value><<<grid, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        data(q_NO), data(u_NR), data(b_OR), gamma_O.const_data_ptr<float>(), static_cast<float>(scale), rows, width,
        static_cast<int>(r));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  has_packs<at::BFloat16>(width, q_NO) ? run(std::integral_constant<int, 8>{}) : run(std::integral_constant<int, 1>{});
}

at::Tensor squared_row_norms(const at::Tensor& w_OI, const at::Tensor& a_RI, const at::Tensor& b_OR, double scale) {
  const int64_t rows = w_OI.size(0), width = w_OI.size(1), r = a_RI.size(0);
  require(w_OI, at::kBFloat16, rows * width, "squared_row_norms W");
  require(a_RI, at::kBFloat16, r * width, "squared_row_norms A");
  require(b_OR, at::kBFloat16, rows * r, "squared_row_norms B");
  TORCH_CHECK(r % 8 == 0 && has_packs<at::BFloat16>(r, b_OR) && has_packs<at::BFloat16>(width, {w_OI, a_RI}),
              "squared_row_norms: rank ", r, " or width ", width, " is not a multiple of 8");
  const int64_t parts = ceil_div(width, int64_t{kTilesOfBlock} * kTileColumns);
  at::Tensor partial = at::empty({parts, rows}, w_OI.options().dtype(at::kFloat));
  const dim3 grid(grid_size(ceil_div(rows, kTileRows)), second_grid_size(parts));
  const auto data = [](const at::Tensor& t) { return static_cast<const Factor*>(t.const_data_ptr()); };
  squared_rows<<<grid, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      data(w_OI), data(a_RI), data(b_OR), static_cast<float>(scale), partial.mutable_data_ptr<float>(), rows, width,
      static_cast<int>(r));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return partial;
}

std::pair<at::Tensor, at::Tensor> scale_and_dot(const at::Tensor& g_NO, const at::Tensor& z_NO,
                                                const at::Tensor& gamma_O, const at::Tensor& factor_O) {
  const int64_t rows = g_NO.size(0), width = g_NO.size(1);
  require(g_NO, g_NO.scalar_type(), rows * width, "scale_and_dot g");
  require(z_NO, g_NO.scalar_type(), rows * width, "scale_and_dot z");
  require(gamma_O, at::kFloat, width, "scale_and_dot gamma");
  require(factor_O, at::kFloat, width, "scale_and_dot factor");
  at::Tensor h_NO = at::empty_like(g_NO);
  if (g_NO.numel() == 0) return {h_NO, at::zeros_like(gamma_O)};
  const int64_t blocks = ceil_div(rows, kRowsOfBlock);
  at::Tensor partial = at::empty({blocks, width}, gamma_O.options());
  with_packs(g_NO, width, {z_NO, h_NO}, [&](auto type, auto wide) {
    using T = decltype(type);
    constexpr int W = decltype(wide)::value;
    const int64_t packs = width / W;
    const dim3 grid(grid_size(ceil_div(packs, kLanes)), second_grid_size(blocks));
    scale_and_dot<T, W><<<grid, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        g_NO.const_data_ptr<T>(), z_NO.const_data_ptr<T>(), gamma_O.const_data_ptr<float>(), h_NO.mutable_data_ptr<T>(),
        partial.mutable_data_ptr<float>(), rows, packs);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  at::Tensor dots_O = at::empty_like(gamma_O);
  sum_rows<<<grid_size(ceil_div(width, kThreads)), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      partial.const_data_ptr<float>(), factor_O.const_data_ptr<float>(), dots_O.mutable_data_ptr<float>(), blocks,
      width);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {h_NO, dots_O};
}

}  // namespace corank::ops::cuda
