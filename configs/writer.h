#pragma once
#include <string>
#include <utility>
#include <vector>

/// YAML values on one line, as configs/reader.h reads them back.
namespace corank::yaml {

std::string quoted(const std::string& text);
std::string list(const std::vector<std::string>& entries);
std::string map(const std::vector<std::pair<std::string, double>>& entries);

}  // namespace corank::yaml
