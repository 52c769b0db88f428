#include "configs/writer.h"

#include <fmt/format.h>

namespace corank::yaml {

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  return result + "\"";
}

std::string list(const std::vector<std::string>& entries) {
  std::string result;
  for (const std::string& entry : entries) result += (result.empty() ? "" : ", ") + quoted(entry);
  return "[" + result + "]";
}

std::string map(const std::vector<std::pair<std::string, double>>& entries) {
  std::string result;
  for (const auto& [key, value] : entries)
    result += fmt::format("{}{}: {}", result.empty() ? "" : ", ", quoted(key), value);
  return "{" + result + "}";
}

}  // namespace corank::yaml
