#include "trainer/quant/formats.h"

#include <fmt/format.h>

#include "configs/error.h"

namespace corank {
namespace {

struct Format {
  const char* name;
  std::unique_ptr<FrozenWeight> (*make)(const FormatOptions&, const ReadShard&, const Shard&);
};

constexpr Format kFormats[] = {
    {"none", make_dense_weight},
};

}  // namespace

std::vector<std::string> format_names() {
  std::vector<std::string> names;
  for (const Format& format : kFormats) names.emplace_back(format.name);
  return names;
}

std::unique_ptr<FrozenWeight> make_frozen_weight(const FormatOptions& options, const ReadShard& read,
                                                 const Shard& shard) {
  for (const Format& format : kFormats) {
    if (options.name == format.name) return format.make(options, read, shard);
  }
  throw ConfigError(
      fmt::format("model.quantization: '{}' is not one of {}", options.name, fmt::join(format_names(), ", ")));
}

}  // namespace corank
