#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#include "configs/error.h"

namespace corank {

/// A JSON value for a message: on one line, at most 80 bytes, nothing in it that a terminal would obey.
std::string shown(const nlohmann::ordered_json& value);
/// A key for a message: as it is where that is harmless, otherwise as shown() writes it.
std::string shown_key(const std::string& key);

/// One object of a JSON file from a stranger, with the file's name and the key in every message. Asking for a key makes
/// it a known one; done() refuses the keys that nobody asked for. Types are exact: no fraction becomes a whole number,
/// no boolean a number. A key that is null counts as absent unless is_null() is asked. All errors are InputError.
class JsonObject {
 public:
  /// Text as parse_json() takes it, whose value has to be an object.
  JsonObject(const std::string& text, std::string origin);
  /// An object that stands in another one; `origin` names both.
  JsonObject(nlohmann::ordered_json object, std::string origin);

  const std::string& origin() const { return origin_; }
  const nlohmann::ordered_json& root() const { return root_; }

  /// Present and not null.
  bool has(const std::string& key) const { return find(key) && !find(key)->is_null(); }
  /// Present, be it as null.
  bool contains(const std::string& key) const { return find(key) != nullptr; }
  /// Present as null.
  bool is_null(const std::string& key) const { return find(key) && find(key)->is_null(); }
  /// The value as it stands there; null where it is absent.
  const nlohmann::ordered_json& value(const std::string& key) const;

  /// T: bool, int64_t, double, std::string, JsonObject, or a std::vector of them.
  template <class T>
  T get(const std::string& key) const {
    if (!has(key)) fail(key + " is missing");
    return convert<T>(*find(key), key);
  }
  template <class T>
  T get(const std::string& key, T default_value) const {
    return has(key) ? convert<T>(*find(key), key) : std::move(default_value);
  }
  template <class T>
  std::optional<T> get_optional(const std::string& key) const {
    return has(key) ? std::optional<T>(convert<T>(*find(key), key)) : std::nullopt;
  }
  /// `value` as a T; `key` stands in the error.
  template <class T>
  T convert(const nlohmann::ordered_json& value, const std::string& key) const;

  /// These keys need no reading: what they say does not change the result.
  void ignore(const std::vector<std::string>& keys) const { known_.insert(keys.begin(), keys.end()); }
  /// The keys that nobody asked for, in file order.
  std::vector<std::string> unknown() const;
  /// Refuses them by name.
  void done() const;

  [[noreturn]] void fail(const std::string& what) const { throw InputError(origin_ + ": " + what + "."); }

 private:
  const nlohmann::ordered_json* find(const std::string& key) const;
  [[noreturn]] void refuse(const nlohmann::ordered_json& value, const std::string& key, const char* wanted) const;

  std::string origin_;
  nlohmann::ordered_json root_;
  mutable std::set<std::string> known_;
};

template <class T>
T JsonObject::convert(const nlohmann::ordered_json& value, const std::string& key) const {
  if constexpr (std::is_same_v<T, bool>) {
    if (!value.is_boolean()) refuse(value, key, "true or false");
    return value.get<bool>();
  } else if constexpr (std::is_same_v<T, int64_t>) {
    const bool fits =
        value.is_number_unsigned() ? value.get<uint64_t>() <= uint64_t{INT64_MAX} : value.is_number_integer();
    if (!fits) refuse(value, key, "a whole number below 2^63");
    return value.get<int64_t>();
  } else if constexpr (std::is_same_v<T, double>) {
    if (!value.is_number()) refuse(value, key, "a number");
    return value.get<double>();
  } else if constexpr (std::is_same_v<T, std::string>) {
    if (!value.is_string()) refuse(value, key, "a string");
    return value.get<std::string>();
  } else if constexpr (std::is_same_v<T, JsonObject>) {
    if (!value.is_object()) refuse(value, key, "an object");
    return JsonObject(value, origin_ + ": " + key);
  } else {
    if (!value.is_array()) refuse(value, key, "a list");
    T values;
    for (const auto& item : value) values.push_back(convert<typename T::value_type>(item, key));
    return values;
  }
}

}  // namespace corank
