#include "trainer/weights/formats.h"

#include <fmt/format.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "configs/error.h"

namespace corank {
namespace {

std::vector<Format>& formats() {
  static std::vector<Format> table{
      {"none", make_dense_weight, /*shares_rooms=*/true},
      {"nf4", make_nf4_weight},
      {"int8", make_int8_weight},
  };
  return table;
}

const Format& format_of(const FormatOptions& options) {
  for (const Format& format : formats()) {
    if (options.name == format.name) return format;
  }
  throw ConfigError(
      fmt::format("model.quantization: '{}' is not one of {}", options.name, fmt::join(format_names(), ", ")));
}

}  // namespace

std::vector<std::string> format_names() {
  std::vector<std::string> names;
  for (const Format& format : formats()) names.emplace_back(format.name);
  return names;
}

std::unique_ptr<FrozenWeight> make_frozen_weight(const FormatOptions& options, const StoredWeight& stored,
                                                 const Shard& shard, const WeightPlace& place) {
  return format_of(options).make(options, stored, shard, place);
}

std::vector<at::Tensor> shared_rooms(const FormatOptions& options, const std::vector<int64_t>& rows, int64_t in,
                                     Residency& residency) {
  if (rows.size() < 2 || !format_of(options).shares_rooms) return std::vector<at::Tensor>(rows.size());
  const int64_t all = std::accumulate(rows.begin(), rows.end(), int64_t{0});
  const at::Tensor room = residency.shared_room({all, in}, at::TensorOptions(options.dtype).device(options.device));
  return room.defined() ? room.split_with_sizes(rows) : std::vector<at::Tensor>(rows.size());
}

ScopedFormat::ScopedFormat(const Format& format) : name_(format.name) { formats().push_back(format); }

ScopedFormat::~ScopedFormat() {
  std::erase_if(formats(), [&](const Format& format) { return format.name == name_; });
}

at::Tensor read_finite(const StoredWeight& stored, const Shard& shard) {
  const at::Tensor w = stored.read(shard);
  if (w.is_meta()) return w;
  const double largest = at::linalg_vector_norm(w, std::numeric_limits<double>::infinity()).item<double>();
  if (std::isfinite(largest)) return w;
  throw InputError(
      fmt::format("tensor {} holds NaN or infinity and cannot be quantised; fetch the model again.", stored.name));
}

}  // namespace corank
