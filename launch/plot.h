#pragma once
#include <string>

namespace corank {

class Storage;

/// Has launch/plot draw `json` as the chart `kind` into `file` (.png, .svg or .pdf). The script stands beside the
/// build's folder. ConfigError for another ending, MissingError where it cannot be drawn; the script says why.
void plot(Storage& storage, const std::string& kind, const std::string& json, const std::string& file);

}  // namespace corank
