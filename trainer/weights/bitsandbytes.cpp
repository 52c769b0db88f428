#include "trainer/weights/bitsandbytes.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "configs/error.h"
#include "data/json_object.h"

namespace corank {
namespace {

using nlohmann::ordered_json;

const char* const kState = ".quant_state.bitsandbytes__nf4";

/// One weight of the folder: its parts are tensors whose names begin with its own.
class PackedWeight {
 public:
  PackedWeight(WeightFile& file, std::string name, bool outline)
      : file_(file), name_(std::move(name)), outline_(outline), state_(read_state()) {}

  [[noreturn]] void refuse(const std::string& what) const {
    throw InputError(
        fmt::format("{}: weight {}: {}. Quantise the model again with bitsandbytes' defaults, or take the "
                    "one in 16 bits and write model.quantization: nf4.",
                    file_.folder(), name_, what));
  }

  /// Refuses a state that says otherwise.
  void require(const char* key, const ordered_json& value) const {
    const ordered_json& found = state_.value(key);
    if (found != value) refuse(fmt::format("{} is {}, not {}", key, shown(found), shown(value)));
  }

  bool nested() const { return state_.has("nested_offset"); }

  float nested_offset() const {
    const auto offset = state_.get<double>("nested_offset");
    if (std::abs(offset) > std::numeric_limits<float>::max()) refuse("nested_offset is no float");
    return static_cast<float>(offset);
  }

  at::Tensor part(const char* suffix, at::ScalarType dtype, const std::vector<int64_t>& shape) const {
    const std::string full_name = name_ + suffix;
    if (!file_.has(full_name)) refuse("tensor " + full_name + " is missing");
    const TensorInfo& info = file_.info(full_name);
    if (info.dtype != dtype || info.shape != shape) {
      refuse(fmt::format("{} is {} [{}], not {} [{}]", full_name, c10::toString(info.dtype),
                         fmt::join(info.shape, ", "), c10::toString(dtype), fmt::join(shape, ", ")));
    }
    if (outline_) {
      file_.mark_used(full_name);
      return at::empty(shape, at::TensorOptions(dtype).device(at::kMeta));
    }
    const at::Tensor values = file_.read(full_name);
    file_.require_finite(full_name, values);
    return values;
  }

 private:
  /// A JSON text, byte for byte a tensor.
  JsonObject read_state() const {
    constexpr int64_t kMostBytes = int64_t{1} << 16;
    const std::string state_name = name_ + kState;
    if (!file_.has(state_name)) refuse("it is not quantised to nf4, as others of this folder are");
    const TensorInfo& info = file_.info(state_name);
    if (info.dtype != at::kByte || info.bytes > kMostBytes) refuse(state_name + " is no U8 of a JSON text's size");
    const at::Tensor bytes = file_.read(state_name);
    const std::string text(static_cast<const char*>(bytes.const_data_ptr()), bytes.nbytes());
    return {text, file_.folder() + ": tensor " + state_name};
  }

  WeightFile& file_;
  std::string name_;
  bool outline_;
  JsonObject state_;
};

}  // namespace

bool holds_bitsandbytes_nf4(const WeightFile& file) {
  const std::vector<std::string> names = file.names();
  return std::any_of(names.begin(), names.end(), [](const std::string& name) { return name.ends_with(kState); });
}

ops::Nf4 read_bitsandbytes_nf4(WeightFile& file, const std::string& name, const std::vector<int64_t>& shape,
                               bool outline) {
  const PackedWeight weight(file, name, outline);
  weight.require("quant_type", "nf4");
  weight.require("blocksize", ops::kNf4Block);
  weight.require("shape", shape);
  const int64_t count = shape.at(0) * shape.at(1), blocks = (count + ops::kNf4Block - 1) / ops::kNf4Block;
  const at::Tensor values = weight.part(".quant_map", at::kFloat, {16});
  if (!outline && !std::equal(ops::kNf4Values.begin(), ops::kNf4Values.end(), values.const_data_ptr<float>())) {
    weight.refuse("quant_map holds other values than nf4's");
  }
  ops::Nf4 result;
  result.shape = shape;
  result.runs = {1, count, count, 0};
  result.codes = weight.part("", at::kByte, {(count + 1) / 2, 1}).flatten();
  result.absmax_RB = weight.part(".absmax", weight.nested() ? at::kByte : at::kFloat, {blocks}).unsqueeze(0);
  if (!weight.nested()) return result;
  weight.require("nested_blocksize", ops::kNf4NestedBlock);
  result.nested_absmax =
      weight.part(".nested_absmax", at::kFloat, {(blocks + ops::kNf4NestedBlock - 1) / ops::kNf4NestedBlock});
  result.nested_map = weight.part(".nested_quant_map", at::kFloat, {256});
  result.nested_offset = weight.nested_offset();
  return result;
}

}  // namespace corank
