#include "trainer/ops/cuda_common.cuh"

namespace corank::ops::cuda {
namespace {

constexpr int kThreads = 256;

/// One side of the matrix: features of all ranks (`size`), this rank's (`start`, `length`), and how they map to
/// `blocks` rows of `r` values, `pitch` apart. `width`: up to where features stand, the first of them again behind the
/// last; `size` where they do not.
struct Side {
  int size, start, length, width;
  int r, pitch, blocks;
  int start_in_period;  ///< start modulo r * blocks
  bool runs;            ///< groups are runs of neighbours, the first `longer` of them of run + 1, else of `run`
  int run, longer;

  __device__ bool local(int j) const { return j >= start && j < start + length; }
  __device__ int begin_of_run(int group) const { return group * run + min(group, longer); }
};

/// The value of one feature after another in a row of blocks: one division for many features.
class Walk {
 public:
  __device__ Walk(const Side& side, int feature) : s_(side) {
    if (s_.runs) {
      const int cut = s_.longer * (s_.run + 1);
      at_ = feature < cut ? feature / (s_.run + 1) : s_.longer + (feature - cut) / s_.run;
      left_ = s_.begin_of_run(at_ + 1) - feature;
    } else {
      const int group = feature % (s_.r * s_.blocks);
      block_ = group / s_.r;
      at_ = block_ * s_.pitch + group % s_.r;
      left_ = s_.r - group % s_.r;
    }
  }
  __device__ int place() const { return at_; }
  __device__ void next() {
    if (s_.runs) {
      if (--left_ > 0) return;
      ++at_;
      left_ = s_.run + (at_ < s_.longer);
    } else {
      ++at_;
      if (--left_ > 0) return;
      block_ = block_ + 1 == s_.blocks ? 0 : block_ + 1;
      at_ = block_ * s_.pitch;
      left_ = s_.r;
    }
  }

 private:
  const Side& s_;
  int at_, left_, block_ = 0;
};

/// Values of a row that belong to one of the runs, summed.
template <class T>
__device__ float run_sum(const T* row, const Side& s, int group) {
  const int begin = max(s.begin_of_run(group), s.start), end = min(s.begin_of_run(group + 1), s.start + s.length);
  float sum = 0;
  for (int j = begin; j < end; ++j) sum += static_cast<float>(row[j - s.start]);
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_runs(const T* __restrict__ x, T* __restrict__ c, Side s) {
  const T* row = x + int64_t{blockIdx.x} * s.length;
  T* out = c + int64_t{blockIdx.x} * s.pitch;
  for (int l = threadIdx.x; l < s.pitch; l += kThreads) {
    out[l] = static_cast<T>(l < s.r ? run_sum(row, s, l) : 0.0F);
  }
}

/// Sums over the features that are equal modulo r times blocks, W neighbouring sums a thread.
template <class T, int W>
__global__ void __launch_bounds__(kThreads) sum_periods(const T* __restrict__ x, T* __restrict__ c, Side s) {
  const T* row = x + int64_t{blockIdx.x} * s.length;
  T* out = c + int64_t{blockIdx.x} * s.blocks * s.pitch;
  const int period = s.r * s.blocks, packs = s.pitch / W;
  for (int i = threadIdx.x; i < s.blocks * packs; i += kThreads) {
    const int l = i % packs * W, group = i / packs * s.r + l;
    float sums[W] = {};
    if (l < s.r) {
      const int shift = group - s.start_in_period;
#pragma unroll 4
      for (int j = shift < 0 ? shift + period : shift; j < s.length; j += period) {
        const Pack<T, W> pack = load<W>(row, j / W);
#pragma unroll
        for (int k = 0; k < W; ++k) sums[k] += static_cast<float>(pack.v[k]);
      }
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const int again = s.width - period + group + k - s.size;  // the feature that stands here a second time
        if (again >= 0 && s.local(again)) sums[k] += static_cast<float>(row[again - s.start]);
      }
    }
    Pack<T, W> pack;
#pragma unroll
    for (int k = 0; k < W; ++k) pack.v[k] = static_cast<T>(sums[k]);
    store<W>(out, i, pack);
  }
}

/// c of a block: its features turned by its angles. A thread makes both members of its pairs.
template <class T>
__global__ void __launch_bounds__(kThreads)
    rotate(const T* __restrict__ x, const T* __restrict__ cos, const T* __restrict__ sin, T* __restrict__ c, Side s) {
  const T* row = x + int64_t{blockIdx.x} * s.length;
  T* out = c + int64_t{blockIdx.x} * s.blocks * s.pitch;
  const auto feature = [&](int place) {
    const int j = place < s.size ? place : place - s.size;
    return s.local(j) ? static_cast<float>(row[j - s.start]) : 0.0F;
  };
  const int half = s.r / 2;
  for (int l = threadIdx.x; l < half; l += kThreads) {
#pragma unroll 4
    for (int b = 0; b < s.blocks; ++b) {
      const auto cosine = static_cast<float>(cos[b * half + l]), sine = static_cast<float>(sin[b * half + l]);
      const float first = feature(b * s.r + l), second = feature(b * s.r + half + l);
      out[b * s.pitch + l] = static_cast<T>(first * cosine - second * sine);
      out[b * s.pitch + half + l] = static_cast<T>(second * cosine + first * sine);
    }
  }
  for (int l = s.r + threadIdx.x; l < s.pitch; l += kThreads) {
    for (int b = 0; b < s.blocks; ++b) out[b * s.pitch + l] = static_cast<T>(0.0F);
  }
}

/// y += the value of each feature's group, and of its second place where it has one.
template <class T, int W>
__global__ void __launch_bounds__(kThreads) add_spread(T* __restrict__ y, const T* __restrict__ z, Side s) {
  const int packs = s.length / W;
  const int64_t row = int64_t{blockIdx.x} * packs;
  const T* values = z + int64_t{blockIdx.x} * s.blocks * s.pitch;
  for (int i = threadIdx.x; i < packs; i += kThreads) {
    Pack<T, W> pack = load<W>(y, row + i);
    Walk walk(s, s.start + i * W);
#pragma unroll
    for (int k = 0; k < W; ++k, walk.next()) {
      const int again = s.size + s.start + i * W + k;
      auto value = static_cast<float>(values[walk.place()]);
      if (again < s.width) value += static_cast<float>(values[Walk(s, again).place()]);
      pack.v[k] = static_cast<T>(static_cast<float>(pack.v[k]) + value);
    }
    store<W>(y, row + i, pack);
  }
}

/// dx += each feature's gradient, turned back; `used` packs of a row belong to blocks that were read.
template <class T, int W>
__global__ void __launch_bounds__(kThreads)
    add_rotated_back(T* __restrict__ dx, const T* __restrict__ dc, const T* __restrict__ cos, const T* __restrict__ sin,
                     Side s, int used) {
  const int half = s.r / 2;
  const int64_t row = int64_t{blockIdx.x} * (s.length / W);
  const T* values = dc + int64_t{blockIdx.x} * s.blocks * s.pitch;
  const auto turned = [&](int b, int l) {
    if (b >= s.blocks) return 0.0F;
    const int angle = l < half ? l : l - half;
    const auto cosine = static_cast<float>(cos[b * half + angle]), sine = static_cast<float>(sin[b * half + angle]);
    const auto first = static_cast<float>(values[b * s.pitch + angle]);
    const auto second = static_cast<float>(values[b * s.pitch + angle + half]);
    return l < half ? first * cosine + second * sine : second * cosine - first * sine;
  };
  for (int i = threadIdx.x; i < used; i += kThreads) {
    Pack<T, W> pack = load<W>(dx, row + i);
    int b = (s.start + i * W) / s.r, l = (s.start + i * W) % s.r;
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const int again = s.size + s.start + i * W + k;
      float value = turned(b, l);
      if (again < s.width) value += turned(again / s.r, again % s.r);
      pack.v[k] = static_cast<T>(static_cast<float>(pack.v[k]) + value);
      if (++l == s.r) l = 0, ++b;
    }
    store<W>(dx, row + i, pack);
  }
}

int64_t pitch_of(const Mora& s) { return ceil_div(s.side(), 8) * 8; }

Side side(const Mora& s, const Extent& extent, Grouping grouping, bool wraps) {
  const int64_t r = s.side(), blocks = s.blocks();
  TORCH_CHECK(extent.size + blocks * pitch_of(s) < std::numeric_limits<int32_t>::max(), "MoRA: too many features");
  const bool runs = grouping == Grouping::block;
  const auto number = [](int64_t n) { return static_cast<int>(n); };
  Side side{};
  side.size = number(extent.size);
  side.start = number(extent.start);
  side.length = number(extent.length);
  side.width = number(wraps && !runs ? ceil_div(extent.size, r) * r : extent.size);
  side.r = number(r);
  side.pitch = number(pitch_of(s));
  side.blocks = number(blocks);
  side.start_in_period = number(extent.start % (r * blocks));
  side.runs = runs;
  side.run = number(extent.size / r);
  side.longer = number(extent.size % r);
  return side;
}

void require_compressed(const at::Tensor& c, const at::Tensor& like, const Mora& s) {
  require(c, like.scalar_type(), like.size(0) * s.blocks() * pitch_of(s), "MoRA's compressed rows");
}

at::Tensor empty_compressed(const at::Tensor& x_NL, const Mora& s) {
  if (s.compress != Grouping::rotate) return at::empty({x_NL.size(0), pitch_of(s)}, x_NL.options());
  return at::empty({x_NL.size(0), s.blocks(), pitch_of(s)}, x_NL.options());
}

/// The sums over the groups of x's rows, in packs as wide as sizes allow and threads need.
void sum_groups(const at::Tensor& x_NL, const at::Tensor& c, const Side& s) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto divides = [&](int w) {
    return s.r % w == 0 && s.length % w == 0 && s.start_in_period % w == 0 && s.blocks * s.pitch / w >= kThreads &&
           reinterpret_cast<uintptr_t>(x_NL.const_data_ptr()) % 16 == 0;
  };
  with_type(x_NL, [&](auto type) {
    using T = decltype(type);
    const auto* x = x_NL.const_data_ptr<T>();
    auto* sums = c.mutable_data_ptr<T>();
    const unsigned rows = grid_size(x_NL.size(0));
    if (s.runs) {
      sum_runs<T><<<rows, kThreads, 0, stream>>>(x, sums, s);
    } else if (divides(4)) {
      sum_periods<T, 4><<<rows, kThreads, 0, stream>>>(x, sums, s);
    } else if (divides(2)) {
      sum_periods<T, 2><<<rows, kThreads, 0, stream>>>(x, sums, s);
    } else {
      sum_periods<T, 1><<<rows, kThreads, 0, stream>>>(x, sums, s);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

template <class T>
const T* table(const at::Tensor& table_BH, const at::Tensor& like, const Mora& s) {
  require(table_BH, like.scalar_type(), s.blocks() * (s.side() / 2), "MoRA's rotation table");
  return table_BH.const_data_ptr<T>();
}

}  // namespace

at::Tensor mora_compress(const at::Tensor& x_NL, const Mora& s) {
  require(x_NL, x_NL.scalar_type(), x_NL.size(0) * s.in.length, "MoRA's input");
  at::Tensor c = empty_compressed(x_NL, s);
  if (x_NL.numel() == 0) return c.zero_();
  const Side in = side(s, s.in, s.compress, /*wraps=*/true);
  if (s.compress != Grouping::rotate) {
    sum_groups(x_NL, c, in);
    return c;
  }
  with_type(x_NL, [&](auto type) {
    using T = decltype(type);
    rotate<T><<<grid_size(x_NL.size(0)), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        x_NL.const_data_ptr<T>(), table<T>(s.rotation.cos_BH, x_NL, s), table<T>(s.rotation.sin_BH, x_NL, s),
        c.mutable_data_ptr<T>(), in);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return c;
}

at::Tensor mora_gather(const at::Tensor& g_NL, const Mora& s) {
  require(g_NL, g_NL.scalar_type(), g_NL.size(0) * s.out.length, "MoRA's output gradient");
  at::Tensor dz = empty_compressed(g_NL, s);
  if (g_NL.numel() == 0) return dz.zero_();
  sum_groups(g_NL, dz, side(s, s.out, s.decompress, /*wraps=*/false));
  return dz;
}

void mora_add_decompressed(const at::Tensor& y_NL, const at::Tensor& z, const Mora& s) {
  require(y_NL, y_NL.scalar_type(), y_NL.size(0) * s.out.length, "MoRA's output");
  require_compressed(z, y_NL, s);
  if (y_NL.numel() == 0) return;
  const Side out = side(s, s.out, s.decompress, /*wraps=*/false);
  with_packs(y_NL, s.out.length, {}, [&](auto type, auto width) {
    using T = decltype(type);
    add_spread<T, decltype(width)::value><<<grid_size(y_NL.size(0)), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        y_NL.mutable_data_ptr<T>(), z.const_data_ptr<T>(), out);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

void mora_add_expanded(const at::Tensor& dx_NL, const at::Tensor& dc, const Mora& s) {
  require(dx_NL, dx_NL.scalar_type(), dx_NL.size(0) * s.in.length, "MoRA's input gradient");
  require_compressed(dc, dx_NL, s);
  if (dx_NL.numel() == 0) return;
  const Side in = side(s, s.in, s.compress, /*wraps=*/true);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  with_packs(dx_NL, s.in.length, {}, [&](auto type, auto width) {
    using T = decltype(type);
    constexpr int W = decltype(width)::value;
    T* dx = dx_NL.mutable_data_ptr<T>();
    if (s.compress == Grouping::rotate) {
      const int64_t read = std::clamp<int64_t>(s.blocks() * s.side() - s.in.start, 0, s.in.length);
      add_rotated_back<T, W><<<grid_size(dx_NL.size(0)), kThreads, 0, stream>>>(
          dx, dc.const_data_ptr<T>(), table<T>(s.rotation.cos_BH, dx_NL, s), table<T>(s.rotation.sin_BH, dx_NL, s), in,
          static_cast<int>(ceil_div(read, W)));
    } else {
      add_spread<T, W><<<grid_size(dx_NL.size(0)), kThreads, 0, stream>>>(dx, dc.const_data_ptr<T>(), in);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace corank::ops::cuda
