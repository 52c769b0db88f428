#pragma once
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <string>
#include <vector>

#include "trainer/layers/model.h"
#include "trainer/methods/config.h"

namespace corank {

/// A run's adapter section beside the file that the run starts from. Borrows all.
struct RunBesideFile {
  const AdapterConfig& run;
  const std::vector<std::string>& written;  ///< keys that the run's section holds
  const AdapterConfig& file;

  /// Whether the run file says something of the file's `key`: one that the file's method does not have (r beside
  /// AdaLoRA) says nothing of it.
  bool writes(const std::string& key) const;
  /// ConfigError if the run file writes `key` and the values differ.
  template <class T>
  void require_same(const std::string& key, const T& ours, const T& theirs) const {
    if (writes(key) && ours != theirs) refuse(key, fmt::format("{}", ours), fmt::format("{}", theirs));
  }
  [[noreturn]] void refuse(const std::string& key, const std::string& ours, const std::string& theirs) const;
};

/// The config of a run that starts from `file`: keys that the run file leaves out come from the file; keys in both must
/// mean the same, else ConfigError naming both. `written` holds the keys of the run's adapter section, `modules` the
/// names of the run's model. InputError if the file's targets are not of this model.
AdapterConfig merge_with_file(const AdapterConfig& run, const std::vector<std::string>& written,
                              const AdapterConfig& file, const ModuleNames& modules);

}  // namespace corank
