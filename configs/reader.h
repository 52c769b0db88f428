#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "configs/error.h"

namespace corank {

/// One map of a run file, read strictly: a key that nobody read is an error with file, line and the nearest known key.
/// A Section is a cheap handle; its children share what was read. Not thread-safe.
///
///   Section run = Section::load("run.yaml", {"train.seed=7"});
///   Section train = run.section("train");
///   int64_t steps = train.get<int64_t>("max_steps");          // required
///   double rate = train.get<double>("learning_rate", 2e-4);   // optional
///   run.done();                                               // throws on what nobody read
class Section {
 public:
  /// Parses `path` and lays `overrides` ("key.sub=value", value in YAML, each key once) over it. A value replaces what
  /// stood there, lists and maps as a whole; null takes the key away; what YAML would read in part only (" #" begins a
  /// comment) or as a map without braces is refused. Refused with ConfigError: more than one document,
  /// anchors, aliases, tags, merge keys, duplicate keys, text that is not UTF-8 or holds NUL, a file over 1 MB, 10,000
  /// nodes or 32 levels. A missing file is a MissingError.
  static Section load(const std::string& path, const std::vector<std::string>& overrides = {});
  /// The same from text; `origin` stands for the file name in messages.
  static Section parse(const std::string& text, const std::string& origin,
                       const std::vector<std::string>& overrides = {});

  /// Asks only: the key becomes a known one, and stays unread.
  bool has(const std::string& key) const;
  /// The map under `key`; an absent one, or one without entries, reads as empty. Throws ConfigError if it is not a map.
  Section section(const std::string& key) const;

  /// The value of a required key. T: bool, int64_t, double, std::string, std::vector of std::string or int64_t,
  /// std::map<std::string, int64_t>, std::map<std::string, double> (entries in file order are kept by `get_ordered`).
  /// Strict: bool is true or false, int64_t decimal digits, double finite; numbers and bools stand without quotes; a
  /// string is any scalar. A key without a value (null) is an error, not the default.
  template <class T>
  T get(const std::string& key) const;
  template <class T>
  T get(const std::string& key, const T& default_value) const {
    return has(key) ? get<T>(key) : default_value;
  }
  template <class T>
  std::optional<T> get_optional(const std::string& key) const {
    return has(key) ? std::optional<T>(get<T>(key)) : std::nullopt;
  }
  /// A map whose entries keep the file's order (PEFT's rank_pattern: the first match wins).
  std::vector<std::pair<std::string, double>> get_ordered(const std::string& key) const;
  /// True if the value under `key` is a list (PEFT's target_modules is a string or a list).
  bool is_list(const std::string& key) const;

  /// One of `allowed`, else ConfigError listing them.
  std::string get_choice(const std::string& key, const std::string& default_value,
                         const std::vector<std::string>& allowed) const;

  /// Throws ConfigError naming every key, here and below, that nobody read.
  void done() const;

  /// "run.yaml:12: train.max_steps" for messages, "command line: train.max_steps" for what an override set; the section
  /// itself when `key` is empty.
  std::string where(const std::string& key = "") const;
  /// ConfigError with where(key) in front.
  [[noreturn]] void fail(const std::string& key, const std::string& message) const;

 private:
  struct Tree;
  struct State;
  explicit Section(std::shared_ptr<State> state);
  std::shared_ptr<State> state_;
};

/// The entry of `known` nearest to `word` by edit distance, if any is near enough to suggest.
std::optional<std::string> nearest(std::string_view word, const std::vector<std::string>& known);

}  // namespace corank
