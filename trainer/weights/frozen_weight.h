#pragma once
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "trainer/ops/quantize.h"
#include "trainer/weights/matrix.h"
#include "trainer/weights/residency.h"
#include "trainer/weights/shard.h"

namespace corank {

/// Where a weight's bytes go.
struct WeightPlace {
  std::shared_ptr<Residency> residency = resident();
  int64_t order = 0;   ///< in forward; weights of one input share it
  at::Tensor room_OI;  ///< rows of a matrix that it shares with others (shared_rooms); undefined: its own memory
};

/// A base weight [O, I] (this rank's block) that never trains, in some stored format. Backward re-materialises W;
/// nothing of size [O, I] in the compute dtype outlives a call unless the format is dense.
class FrozenWeight : public Matrix {
 public:
  /// Its place in forward; weights of one input share it.
  int64_t order() const { return place_.order; }
  /// Bytes held on the device.
  int64_t bytes() const { return bytes_->device_bytes(); }
  /// As in StoredBytes.
  int64_t gather_bytes() const { return bytes_->gather_bytes(); }

 protected:
  explicit FrozenWeight(WeightPlace place) : place_(std::move(place)) {}
  /// Hands the stored tensors over, in place of earlier ones.
  void keep(std::vector<at::Tensor> tensors) { bytes_ = place_.residency->keep(place_.order, std::move(tensors)); }
  void keep_trained(const at::Tensor& values, at::IntArrayRef shape) {
    bytes_ = place_.residency->keep_trained(place_.order, values, shape);
  }
  std::vector<at::Tensor> stored(Pass pass) const { return bytes_->on_device(pass); }

  WeightPlace place_;

 private:
  std::unique_ptr<StoredBytes> bytes_;
};

/// A weight where a format finds it. Formats whose statistics span the full tensor read it whole and slice the result,
/// so that every layout has the same weight.
struct StoredWeight {
  std::string name;  ///< for messages
  /// The block that a Shard names, on the CPU in the file's dtype.
  std::function<at::Tensor(const Shard&)> read;
  /// All of it, on the CPU, where the files hold NF4.
  std::function<std::optional<ops::Nf4>()> read_nf4;
};

struct FormatOptions {
  std::string name = "none";             ///< model.quantization
  bool double_quant = true;              ///< model.double_quant, of nf4
  at::ScalarType dtype = at::kBFloat16;  ///< compute dtype
  at::Device device = at::kCPU;
};

/// All that it takes to make a frozen weight, now or again.
struct BaseWeight {
  FormatOptions format;
  StoredWeight stored;
  Shard shard;  ///< of the [O, I] matrix
  WeightPlace place = {};
};

std::vector<std::string> format_names();
/// A frozen weight in the named format; an unknown name is a ConfigError that lists the known ones.
std::unique_ptr<FrozenWeight> make_frozen_weight(const FormatOptions& options, const StoredWeight& stored,
                                                 const Shard& shard, const WeightPlace& place = {});
/// A weight of `shape` that trains, dense: `values` as in Residency::keep_trained.
std::unique_ptr<FrozenWeight> make_trained_weight(const at::Tensor& values, at::IntArrayRef shape, WeightPlace place);
/// Rooms for weights of `rows` output features that read one input of `in`, one above the other in one matrix;
/// undefined where the format or the residency has none.
std::vector<at::Tensor> shared_rooms(const FormatOptions& options, const std::vector<int64_t>& rows, int64_t in,
                                     Residency& residency);

}  // namespace corank
