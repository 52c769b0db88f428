#include "data/strict_json.h"

#include <unordered_set>
#include <vector>

#include "configs/error.h"
#include "data/json_object.h"

namespace corank {
namespace {

using nlohmann::json;

/// Looks at the text before a value is built from it, because the value no longer shows duplicate keys.
class Checker : public json::json_sax_t {
 public:
  Checker(const std::string& origin, size_t max_depth, size_t max_keys)
      : origin_(origin), max_depth_(max_depth), max_keys_(max_keys) {}

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(size_t) override { return open(); }
  bool start_array(size_t) override { return open(); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(string_t& name) override {
    if (++num_keys_ > max_keys_) refuse("more than " + std::to_string(max_keys_) + " keys");
    if (!open_.back().insert(name).second) refuse("the key " + shown_key(name) + " stands twice");
    return true;
  }
  bool parse_error(size_t, const std::string&, const json::exception& error) override {
    throw InputError(origin_ + ": not valid JSON: " + brief(error.what()) + ".");
  }

 private:
  /// The parser quotes the whole token that it did not like.
  static std::string brief(const std::string& what) {
    constexpr size_t kMost = 160;
    std::string text = what.substr(0, kMost);
    for (char& c : text) {
      if (static_cast<unsigned char>(c) < ' ' || static_cast<unsigned char>(c) > '~') c = '?';
    }
    return text + (what.size() > kMost ? "..." : "");
  }
  [[noreturn]] void refuse(const std::string& message) const {
    throw InputError(origin_ + ": " + message + "; the file is damaged or not meant for this.");
  }
  bool open() {
    if (open_.size() == max_depth_) refuse("nested deeper than " + std::to_string(max_depth_) + " levels");
    open_.emplace_back();
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  const std::string& origin_;
  const size_t max_depth_, max_keys_;
  size_t num_keys_ = 0;
  std::vector<std::unordered_set<std::string>> open_;
};

void check(const std::string& text, const std::string& origin, size_t max_depth, size_t max_keys) {
  if (text.starts_with("\xef\xbb\xbf")) throw InputError(origin + ": begins with a byte order mark; remove it.");
  // The parser would take a NUL for the end of the text.
  if (text.find('\0') != std::string::npos) throw InputError(origin + ": not valid JSON: it holds a NUL byte.");
  Checker checker(origin, max_depth, max_keys);
  json::sax_parse(text, &checker);
}

}  // namespace

json parse_json(const std::string& text, const std::string& origin, size_t max_depth, size_t max_keys) {
  check(text, origin, max_depth, max_keys);
  return json::parse(text);
}

nlohmann::ordered_json parse_ordered_json(const std::string& text, const std::string& origin, size_t max_depth,
                                          size_t max_keys) {
  check(text, origin, max_depth, max_keys);
  return nlohmann::ordered_json::parse(text);
}

}  // namespace corank
