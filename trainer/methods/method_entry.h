#pragma once
#include <fmt/format.h>

#include <cmath>
#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "configs/reader.h"
#include "trainer/methods/config.h"

namespace corank {

class AdapterMethod;
class JsonObject;
struct RunBesideFile;

/// A key of the `adapter` section that one method has.
struct OwnKey {
  std::string name;
  std::function<std::string(const AdapterConfig&)> yaml;  ///< its value in the resolved run; empty: left out
};

/// A field of adapter_config.json that one method has.
struct OwnField {
  std::string name;
  bool may_be_null = false;
};

/// Throws through `fail` unless a value is good.
struct Require {
  const Fail& fail;
  std::string place = {};  ///< within the key, in front of the value

  template <class T>
  void operator()(bool good, const std::string& key, T value, const std::string& wanted) const {
    if (!good) fail(key, fmt::format("{}{} is not {}", place, value, wanted));
  }
  template <class T>
  void rank(const std::string& key, T value) const {
    const auto r = static_cast<double>(value);
    (*this)(r >= 1 && r <= kMaxRank && r == std::floor(r), key, value, fmt::format("a rank in [1, {}]", kMaxRank));
  }
  void scale(const std::string& key, double value) const {
    (*this)(value > 0 && value <= kMaxNumber, key, value, fmt::format("above 0 and at most {}", kMaxNumber));
  }
};

/// A method in the table: its name, what makes it, and its part of an AdapterConfig, which knows no run. What it keeps
/// of the config beside the common fields is a struct of its own in config.options. Stateless. Each function is called
/// for the entry of the config's method, unless it says "any".
class MethodEntry {
 public:
  virtual ~MethodEntry() = default;
  virtual std::string name() const = 0;
  virtual std::unique_ptr<AdapterMethod> make(const AdapterConfig& config) const = 0;

  /// Of the run file's keys that several methods have (config_keys.cpp), those that this one has.
  virtual std::vector<std::string> common_keys() const = 0;
  virtual std::vector<OwnKey> keys() const { return {}; }
  /// Any. Reads its own keys.
  virtual void read(const Section& /*section*/, AdapterConfig& /*config*/) const {}
  /// Any. Throws through `require` for values of its own keys that make no sense.
  virtual void check(const AdapterConfig& /*config*/, const Require& /*require*/) const {}
  /// Any. Throws through `fail` where its keys do not go with the base's format.
  virtual void check_format(const AdapterConfig& /*config*/, const std::string& /*format*/,
                            const Fail& /*fail*/) const {}
  /// Any. Takes the number of the run's optimizer steps.
  virtual void set_total_steps(AdapterConfig& /*config*/, int64_t /*total_steps*/) const {}
  /// ConfigError where its steps do not fit into the run's.
  virtual void check_schedule(const AdapterConfig& /*config*/, int64_t /*total_steps*/) const {}
  virtual int64_t rank_of(const AdapterConfig& config, const std::string& module) const;

  /// How adapter_config.json says that it is this method: by a type of its own, or by a field that is true.
  static constexpr const char* kPlainType = "LORA";
  virtual std::string peft_type() const { return kPlainType; }
  virtual std::string peft_switch() const { return ""; }
  /// Beside those of LoRA.
  virtual std::vector<OwnField> fields() const { return {}; }
  /// Any. Reads its own fields; config.method is the file's.
  virtual void read_fields(const JsonObject& /*file*/, AdapterConfig& /*config*/) const {}
  /// Changes the fields of a LoRA to its own.
  virtual void write_fields(const AdapterConfig& /*config*/, nlohmann::json& /*fields*/) const {}

  /// For the file's method: `merged`, the file's config, becomes that of a run that starts from it. ConfigError where
  /// both contradict each other.
  virtual void merge(const RunBesideFile& /*both*/, AdapterConfig& /*merged*/) const {}
};

}  // namespace corank
