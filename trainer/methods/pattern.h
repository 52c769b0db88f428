#pragma once
#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace corank {

/// Where an expression stands, for messages.
struct PatternPlace {
  std::string name;         ///< file and key
  bool is_adapter = false;  ///< an adapter's file (InputError), else the run file (ConfigError)
  [[noreturn]] void fail(const std::string& what) const;
};

/// A regular expression as Python's re module reads it (3.11), matched by PCRE2 with a bound on its steps. Copies share
/// what was compiled. Refused, naming its place: what Python would refuse, what is longer than 64 KiB or asks for
/// something that is not taken over (verbose mode, characters by name), and, when matched, what takes too many steps.
class Pattern {
 public:
  enum class Extent { start, whole };  ///< re.match, re.fullmatch

  /// `text` stands for `expression`, which PEFT makes of it, in messages.
  Pattern(const std::string& text, const std::string& expression, Extent extent, const PatternPlace& place);

  /// As it was written, before PEFT's rule was put around it.
  const std::string& text() const { return text_; }
  /// `share`: one of how many patterns that are tried one after the other; they share the bound.
  bool matches(const std::string& name, size_t share = 1) const;
  /// What the group (?P<group>...) of a match holds; empty where it took no part, none where there is no such group.
  std::optional<std::string> group(const std::string& name, const char* group) const;

 private:
  struct Compiled;
  using Groups = std::vector<std::pair<size_t, size_t>>;  ///< begin and end of each
  std::optional<Groups> match(const std::string& name, size_t share) const;

  std::string text_;
  PatternPlace place_;
  std::shared_ptr<const Compiled> compiled_;
};

/// target_modules and exclude_modules as a text: must match the whole name.
struct NamePattern : Pattern {
  NamePattern(const std::string& text, const PatternPlace& place = {}) : Pattern(text, text, Extent::whole, place) {}
};

/// A key of rank_pattern or alpha_pattern: must match the end of the name, from its start or a dot.
struct KeyPattern : Pattern {
  KeyPattern(const std::string& key, const PatternPlace& place = {})
      : Pattern(key, "(.*\\.)?(" + key + ")$", Extent::start, place) {}
  KeyPattern(const char* key) : KeyPattern(std::string(key)) {}
};

}  // namespace corank
