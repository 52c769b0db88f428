#pragma once
#include <fmt/format.h>

#include <limits>
#include <optional>
#include <string>

#include "data/json_object.h"
#include "trainer/layers/rope_table.h"

namespace corank {

/// A config.json or an object in it, read as transformers reads it: a key that is absent has its default, and one that
/// is null is refused, unless get_optional() asks for it.
class ConfigFile : public JsonObject {
 public:
  /// Far beyond any model, and small enough that no product of two sizes overflows.
  static constexpr int64_t kMostSize = int64_t{1} << 24;

  using JsonObject::JsonObject;
  explicit ConfigFile(JsonObject object) : JsonObject(std::move(object)) {}

  template <class T>
  T get(const std::string& key) const {
    if (!contains(key)) fail(key + " is missing");
    return convert<T>(value(key), key);
  }
  template <class T>
  T get(const std::string& key, T default_value) const {
    return contains(key) ? get<T>(key) : std::move(default_value);
  }
  /// InputError unless the value, or the default, is in [1, most].
  int64_t get_size(const std::string& key, int64_t default_value, int64_t most = kMostSize) const;
  /// InputError unless the value is positive.
  double get_positive(const std::string& key) const;
  /// InputError unless the value is in [0, 1).
  double get_probability(const std::string& key, double default_value) const;
  /// InputError: the attribute changes the result and is not supported.
  [[noreturn]] void refuse(const std::string& what) const;
  /// Refuses the keys that nobody asked for. Those that begin with _ are transformers' own notes.
  void done() const;
};

/// The most layers that a model may have.
inline constexpr int64_t kMostLayers = 10'000;

/// What no family's result depends on: what transformers keeps in every config.json, and what the programs add that
/// published models were made with.
void ignore_bookkeeping(const ConfigFile& file);

/// The window of each layer, 0 for none: by layer_types, or `window` from layer `first` on.
std::vector<int64_t> layer_windows(const ConfigFile& file, int64_t num_layers, std::optional<int64_t> window,
                                   int64_t first = 0);
/// sliding_window: null says that there is none.
std::optional<int64_t> sliding_window(const ConfigFile& file, std::optional<int64_t> default_value);

}  // namespace corank
