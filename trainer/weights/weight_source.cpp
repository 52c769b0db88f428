#include "trainer/weights/weight_source.h"

#include <fmt/format.h>

#include <algorithm>

#include "configs/error.h"
#include "trainer/ops/random.h"
#include "trainer/weights/bitsandbytes.h"

namespace corank {
namespace {

at::Tensor outline_of(const std::vector<int64_t>& shape, const Shard& shard) {
  return at::empty(shard.local_shape(shape), at::TensorOptions(at::kFloat).device(at::kMeta));
}

class FolderWeights : public WeightSource {
 public:
  FolderWeights(const std::string& folder, bool outline)
      : file_(folder), outline_(outline), holds_nf4_(holds_bitsandbytes_nf4(file_)) {}

  at::Tensor read(const std::string& name, const std::vector<int64_t>& shape, const Shard& shard) override {
    if (!file_.has(name)) {
      throw InputError(
          fmt::format("{}: tensor {} is missing. config.json asks for it; the folder is incomplete or belongs "
                      "to another architecture.",
                      file_.folder(), name));
    }
    const auto& found = file_.info(name).shape;
    if (found != shape) {
      throw InputError(fmt::format("{}: tensor {} has shape [{}], config.json asks for [{}].", file_.folder(), name,
                                   fmt::join(found, ", "), fmt::join(shape, ", ")));
    }
    file_.require_floating(name);
    if (outline_) {
      file_.mark_used(name);
      return outline_of(shape, shard);
    }
    if (shard.whole()) return finite(name, file_.read(name));
    const int64_t start = std::min(shard.start, shape[shard.dim]);
    const int64_t length = std::min(shard.block, shape[shard.dim] - start);
    return take_shard(finite(name, file_.read_slice(name, shard.dim, start, length)), {shard.dim, 0, shard.block});
  }

  std::optional<ops::Nf4> read_nf4(const std::string& name, const std::vector<int64_t>& shape) override {
    if (!holds_nf4_) return std::nullopt;
    return read_bitsandbytes_nf4(file_, name, shape, outline_);
  }

  bool differ(const std::string& a, const std::string& b) override {
    if (!file_.has(a) || !file_.has(b)) return false;
    const TensorInfo &info = file_.info(a), &other = file_.info(b);
    if (info.shape != other.shape) return true;
    const int64_t rows = info.shape.empty() ? 0 : info.shape[0];
    const int64_t piece = rows == 0 ? 1 : std::max<int64_t>(1, kPieceBytes / std::max<int64_t>(1, info.bytes / rows));
    for (int64_t start = 0; start < rows; start += piece) {
      const int64_t length = std::min(piece, rows - start);
      const at::Tensor mine = file_.read_slice(a, 0, start, length), theirs = file_.read_slice(b, 0, start, length);
      if (!at::equal(mine.to(at::kDouble), theirs.to(at::kDouble))) return true;
    }
    return false;
  }

  void skip(const std::string& name) override {
    if (file_.has(name)) file_.mark_used(name);
  }
  void finish() override { file_.require_all_used(); }

 private:
  static constexpr int64_t kPieceBytes = int64_t{1} << 24;

  at::Tensor finite(const std::string& name, at::Tensor values) const {
    file_.require_finite(name, values);
    return values;
  }

  WeightFile file_;
  bool outline_, holds_nf4_;
};

class RandomWeights : public WeightSource {
 public:
  RandomWeights(uint64_t seed, bool outline) : seed_(seed), outline_(outline) {}

  at::Tensor read(const std::string& name, const std::vector<int64_t>& shape, const Shard& shard) override {
    if (outline_) return outline_of(shape, shard);
    at::Tensor local = at::zeros(shard.local_shape(shape), at::TensorOptions(at::kFloat));
    const int64_t inside = shard.whole() ? 0 : std::clamp<int64_t>(shape[shard.dim] - shard.start, 0, shard.block);
    const at::Tensor real = shard.whole() ? local : local.narrow(shard.dim, 0, inside);
    if (shape.size() == 1 && name.ends_with(".weight")) {
      real.fill_(1);
    } else if (!name.ends_with(".bias")) {
      ops::fill_normal(real, ops::key_of(seed_, "weights", name), 0, 0.02, shape, shard.offset(shape.size()));
    }
    return local;
  }

  std::optional<ops::Nf4> read_nf4(const std::string&, const std::vector<int64_t>&) override { return std::nullopt; }
  bool differ(const std::string&, const std::string&) override { return false; }
  void skip(const std::string&) override {}
  void finish() override {}

 private:
  uint64_t seed_;
  bool outline_;
};

}  // namespace

std::unique_ptr<WeightSource> folder_weights(const std::string& folder, bool outline) {
  return std::make_unique<FolderWeights>(folder, outline);
}

std::unique_ptr<WeightSource> random_weights(uint64_t seed, bool outline) {
  return std::make_unique<RandomWeights>(seed, outline);
}

}  // namespace corank
