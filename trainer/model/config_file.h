#pragma once
#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <string>

#include "configs/error.h"
#include "trainer/model/rope_table.h"

namespace corank {

/// One config.json, with its name in every message. A key that is null counts as absent. InputError for what is missing
/// or has the wrong type.
class ConfigFile {
 public:
  ConfigFile(const std::string& text, std::string origin);

  const nlohmann::json& root() const { return json_; }
  bool has(const char* key) const { return json_.contains(key) && !json_[key].is_null(); }

  template <class T>
  T get(const char* key) const {
    if (!has(key)) throw InputError(fmt::format("{}: {} is missing", origin_, key));
    return convert<T>(json_[key], key);
  }
  template <class T>
  T get(const char* key, T default_value) const {
    return has(key) ? convert<T>(json_[key], key) : default_value;
  }
  template <class T>
  T convert(const nlohmann::json& value, const char* key) const {
    try {
      return value.get<T>();
    } catch (const nlohmann::json::exception&) {
      throw InputError(fmt::format("{}: {} has the wrong type: {}", origin_, key, value.dump()));
    }
  }
  /// InputError unless the value is positive; the default is checked too.
  int64_t get_size(const char* key) const;
  int64_t get_size(const char* key, int64_t default_value) const;

  [[noreturn]] void fail(const std::string& what) const { throw InputError(origin_ + ": " + what); }
  /// InputError unless the value is in [0, 1).
  double get_probability(const char* key, double default_value) const;
  /// InputError: the attribute changes the result and is not supported.
  [[noreturn]] void refuse(const std::string& what) const;

 private:
  int64_t positive(const char* key, int64_t size) const;

  std::string origin_;
  nlohmann::json json_;
};

/// transformers 5 writes rope_parameters {rope_theta, rope_type, ...}; earlier versions rope_theta and rope_scaling.
RopeConfig rope_config(const ConfigFile& file);

}  // namespace corank
