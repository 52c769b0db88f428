#include "configs/writer.h"

#include <fmt/format.h>

#include "configs/error.h"
#include "configs/text.h"

namespace corank::yaml {
namespace {

constexpr size_t kLongestSimpleKey = 1000;  // YAML allows 1024 characters; beyond them a key begins with ?

}  // namespace

std::string quoted(const std::string& text) {
  if (!is_utf8(text)) throw ConfigError(printable(text, 80) + ": not UTF-8 text, which no run file can hold.");
  return '"' + escaped(text, "\"\\") + '"';
}

std::string list(const std::vector<std::string>& entries) {
  std::string result;
  for (const std::string& entry : entries) result += (result.empty() ? "" : ", ") + quoted(entry);
  return "[" + result + "]";
}

std::string map(const std::vector<std::pair<std::string, double>>& entries) {
  std::string result;
  for (const auto& [key, value] : entries) {
    const std::string text = quoted(key);
    const char* mark = text.size() < kLongestSimpleKey ? "" : "? ";
    result += fmt::format("{}{}{}: {}", result.empty() ? "" : ", ", mark, text, value);
  }
  return "{" + result + "}";
}

}  // namespace corank::yaml
