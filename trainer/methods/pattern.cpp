#define PCRE2_CODE_UNIT_WIDTH 8
#include "trainer/methods/pattern.h"

#include <fmt/format.h>
#include <pcre2.h>

#include <algorithm>
#include <cctype>
#include <functional>
#include <string_view>
#include <vector>

#include "configs/error.h"
#include "configs/text.h"

namespace corank {
namespace {

constexpr size_t kMaxBytes = size_t{1} << 16;
constexpr size_t kShown = 80;
constexpr uint32_t kMaxSteps = 200'000;  // of PCRE2's matcher for one name: some 5 ms
constexpr uint32_t kMinSteps = 1'000;    // enough for a name written out
constexpr uint32_t kMaxHeapKiB = 1 << 14;

std::string quote(const std::string& text) { return "'" + printable(text, kShown) + "'"; }

[[noreturn]] void refuse(const PatternPlace& place, const std::string& text, const std::string& why) {
  place.fail(quote(text) + " is not a regular expression that can be read: " + why);
}

/// Python's spelling of an expression in PCRE2's. What only PCRE2 knows is refused here, what neither can read (an
/// empty class, say) by PCRE2.
class Translation {
 public:
  Translation(std::string_view python, std::function<void(const std::string& why)> refuse)
      : rest_(python), refuse_(std::move(refuse)) {}

  std::string pcre() {
    while (!rest_.empty()) {
      if (rest_.starts_with("[")) {
        character_class();
      } else if (rest_.starts_with("\\")) {
        escape(/*in_class=*/false);
      } else if (rest_.starts_with("(")) {
        open();
      } else if (rest_.starts_with(")")) {
        if (!open_.empty()) {
          if (open_.back() > 0) closed_.push_back(open_.back());
          open_.pop_back();
        }
        copy(1);
      } else if (rest_.starts_with("{")) {
        repetition();
      } else {
        copy(1);
      }
    }
    return result_;
  }

 private:
  void fail(const std::string& why) const { refuse_(why); }

  void copy(size_t size) {
    size = std::min(size, rest_.size());
    result_ += rest_.substr(0, size);
    at_start_ = false;
    rest_.remove_prefix(size);
  }
  void replace(size_t size, const std::string& by) {
    result_ += by;
    at_start_ = false;
    rest_.remove_prefix(size);
  }

  /// Digits of `base` from `begin` on, at most `most`.
  size_t count_digits(size_t begin, int base, size_t most) const {
    size_t count = 0;
    const auto is_digit = [&](char c) {
      return base == 16 ? std::isxdigit(static_cast<unsigned char>(c)) != 0 : c >= '0' && c < '0' + base;
    };
    while (count < most && begin + count < rest_.size() && is_digit(rest_[begin + count])) ++count;
    return count;
  }
  void character(size_t size, const std::string& digits, int base) {
    replace(size, fmt::format("\\x{{{:x}}}", std::stoul(digits, nullptr, base)));  // at most eight digits
  }

  /// {2}, {2,}, {,3}, {2,3}, {,}; anything else in braces is text.
  void repetition() {
    const size_t least = count_digits(1, 10, rest_.size());
    size_t end = 1 + least, most = 0;
    const bool ranges = rest_.substr(end).starts_with(",");
    if (ranges) end += 1 + (most = count_digits(end + 1, 10, rest_.size()));
    if (!rest_.substr(end).starts_with("}") || (!ranges && least == 0)) return replace(1, "\\{");
    const std::string digits(rest_.substr(1, end - 1));
    replace(end + 1, "{" + std::string(least == 0 ? "0" : "") + digits + "}");
  }

  void character_class() {
    copy(rest_.starts_with("[^") ? 2 : 1);
    if (rest_.starts_with("]")) copy(1);  // as the first it is a character
    while (!rest_.empty() && rest_.front() != ']') {
      if (rest_.starts_with("\\")) {
        escape(/*in_class=*/true);
      } else if (rest_.starts_with("[")) {
        replace(1, "\\[");  // Python knows no [:alpha:]
      } else if (rest_.starts_with(":")) {
        replace(1, "\\:");
      } else {
        copy(1);
      }
    }
    copy(1);
  }

  /// \1, \12 a group, \012 and \123 a character; in a class always one.
  void numbered(bool in_class) {
    const size_t octal = count_digits(1, 8, 3);
    if (rest_[1] == '0' || octal == 3 || in_class) {
      if (octal == 0) fail(fmt::format("\\{} is no character", rest_[1]));
      const std::string digits(rest_.substr(1, octal));
      if (std::stoul(digits, nullptr, 8) > 0377) fail("\\" + digits + " is no character");
      return character(1 + octal, digits, 8);
    }
    const size_t digits = count_digits(1, 10, 2);
    const int group = std::stoi(std::string(rest_.substr(1, digits)));
    if (std::count(closed_.begin(), closed_.end(), group) == 0) fail(fmt::format("no group {} stands before", group));
    replace(1 + digits, fmt::format("\\g{{{}}}", group));
  }

  void escape(bool in_class) {
    if (rest_.size() < 2) fail("it ends in a backslash");
    const char c = rest_[1];
    if (std::isdigit(static_cast<unsigned char>(c))) return numbered(in_class);
    if (!std::isalpha(static_cast<unsigned char>(c))) return copy(2);
    constexpr struct {
      char letter;
      size_t digits;
    } kHex[] = {{'x', 2}, {'u', 4}, {'U', 8}};
    for (const auto& hex : kHex) {
      if (c != hex.letter) continue;
      if (count_digits(2, 16, hex.digits) != hex.digits) fail(fmt::format("\\{} wants {} digits", c, hex.digits));
      return character(2 + hex.digits, std::string(rest_.substr(2, hex.digits)), 16);
    }
    if (c == 'v') return replace(2, "\\x0b");
    if (c == 'Z' && !in_class) return replace(2, "\\z");
    const std::string_view known = in_class ? "abfnrtdDsSwW" : "afnrtdDsSwWbBA";
    if (known.find(c) == std::string_view::npos) fail(fmt::format("\\{} is not known", c));
    copy(2);
  }

  /// A group begins; its number is 0 if it captures nothing.
  void begin(bool captures) { open_.push_back(captures ? ++num_groups_ : 0); }

  void open() {
    if (rest_.starts_with("(*")) fail("nothing stands before *");
    if (!rest_.starts_with("(?")) {
      begin(/*captures=*/true);
      return copy(1);
    }
    if (rest_.starts_with("(?#")) {
      const size_t end = rest_.find(')');
      if (end == std::string_view::npos) fail("a comment has no end");
      return rest_.remove_prefix(end + 1);
    }
    if (rest_.starts_with("(?P=")) return copy(rest_.find(')') == std::string_view::npos ? 4 : rest_.find(')') + 1);
    if (rest_.starts_with("(?P<")) {
      begin(/*captures=*/true);
      return copy(4);
    }
    for (const std::string_view kind : {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>"}) {
      if (!rest_.starts_with(kind)) continue;
      begin(/*captures=*/false);
      return copy(kind.size());
    }
    rest_.starts_with("(?(") ? condition() : flags();
  }

  /// (?(1)yes|no), (?(name)yes|no).
  void condition() {
    const size_t end = rest_.find(')');
    if (end == std::string_view::npos || end == 3) fail("a condition has no end");
    const std::string group(rest_.substr(3, end - 3));
    begin(/*captures=*/false);
    replace(end + 1, count_digits(3, 10, end) == group.size() ? "(?(" + group + ")" : "(?(<" + group + ">)");
  }

  /// (?i) at the start, (?i:...), (?i-s:...). On names of modules, which are ASCII, a and u change nothing.
  void flags() {
    size_t end = 2;
    std::string kept;
    for (; end < rest_.size() && std::string_view("aiLmsux-").find(rest_[end]) != std::string_view::npos; ++end) {
      if (rest_[end] == 'x') fail("verbose mode (x) is not read");
      if (rest_[end] == 'L') fail("flag L is for bytes");
      if (rest_[end] != 'a' && rest_[end] != 'u') kept += rest_[end];
    }
    const char last = end < rest_.size() ? rest_[end] : '\0';
    if (end == 2 || (last != ')' && last != ':')) fail("a group begins with ? and is of no known kind");
    if (last == ')' && (!at_start_ || kept.find('-') != std::string::npos)) fail("flags stand at the start only");
    if (last == ':') begin(/*captures=*/false);
    replace(end + 1, last == ':' ? "(?" + kept + ":" : kept.empty() ? "" : "(?" + kept + ")");
    at_start_ = last == ')';  // flags may be followed by flags
  }

  std::string_view rest_;
  std::function<void(const std::string& why)> refuse_;  // throws
  std::string result_;
  bool at_start_ = true;
  int num_groups_ = 0;
  std::vector<int> open_, closed_;
};

std::string error_text(int code) {
  unsigned char buffer[256];
  pcre2_get_error_message(code, buffer, sizeof buffer);
  return reinterpret_cast<const char*>(buffer);
}

const unsigned char* bytes(const std::string& text) { return reinterpret_cast<const unsigned char*>(text.data()); }

template <class T>
using Owner = std::unique_ptr<T, void (*)(T*)>;

}  // namespace

struct Pattern::Compiled {
  Owner<pcre2_code> code;
};

void PatternPlace::fail(const std::string& what) const {
  const std::string message = (name.empty() ? "" : name + ": ") + what + ".";
  if (is_adapter) throw InputError(message);
  throw ConfigError(message);
}

Pattern::Pattern(const std::string& text, const std::string& expression, Extent extent, const PatternPlace& place)
    : text_(text), place_(place) {
  const auto unreadable = [&](const std::string& why) { refuse(place_, text_, why); };
  if (text.size() > kMaxBytes) unreadable(fmt::format("it has {} bytes, more than {}", text.size(), kMaxBytes));
  const std::string pcre = Translation(expression, unreadable).pcre();
  const uint32_t options = PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C | PCRE2_ANCHORED |
                           (extent == Extent::whole ? PCRE2_ENDANCHORED : 0);
  int error = 0;
  size_t place_of_error = 0;
  Owner<pcre2_code> code(pcre2_compile(bytes(pcre), pcre.size(), options, &error, &place_of_error, nullptr),
                         pcre2_code_free);
  if (!code) unreadable(error_text(error));
  compiled_ = std::make_shared<Compiled>(Compiled{std::move(code)});
}

bool Pattern::matches(const std::string& name, size_t share) const { return match(name, share).has_value(); }

std::optional<std::string> Pattern::group(const std::string& name, const char* group) const {
  const auto ends = match(name, 1);
  if (!ends) return std::nullopt;
  const int number = pcre2_substring_number_from_name(compiled_->code.get(), reinterpret_cast<PCRE2_SPTR>(group));
  if (number < 0) return std::nullopt;
  const auto [begin, end] = ends->at(static_cast<size_t>(number));
  return begin == PCRE2_UNSET ? "" : name.substr(begin, end - begin);
}

std::optional<Pattern::Groups> Pattern::match(const std::string& name, size_t share) const {
  const pcre2_code* code = compiled_->code.get();
  const Owner<pcre2_match_context> context(pcre2_match_context_create(nullptr), pcre2_match_context_free);
  const Owner<pcre2_match_data> found(pcre2_match_data_create_from_pattern(code, nullptr), pcre2_match_data_free);
  if (!context || !found) throw InternalError("PCRE2 has no memory");
  const auto steps = std::max<size_t>(kMinSteps, kMaxSteps / std::max<size_t>(share, 1));
  pcre2_set_match_limit(context.get(), static_cast<uint32_t>(steps));
  pcre2_set_heap_limit(context.get(), kMaxHeapKiB);
  const int result = pcre2_match(code, bytes(name), name.size(), 0, 0, found.get(), context.get());
  if (result == PCRE2_ERROR_NOMATCH) return std::nullopt;
  if (result == PCRE2_ERROR_MATCHLIMIT || result == PCRE2_ERROR_HEAPLIMIT) {
    place_.fail(fmt::format(
        "{} takes too long to match {}: its repetitions divide a name in too many ways. Write it more plainly",
        quote(text_), quote(name)));
  }
  if (result < 0) place_.fail(fmt::format("{} cannot be matched: {}", quote(text_), error_text(result)));
  const size_t* ends = pcre2_get_ovector_pointer(found.get());
  Groups groups;
  for (uint32_t i = 0; i < pcre2_get_ovector_count(found.get()); ++i) groups.emplace_back(ends[2 * i], ends[2 * i + 1]);
  return groups;
}

}  // namespace corank
