#pragma once
#include <nlohmann/json.hpp>
#include <string>

namespace corank {

/// Parses JSON from a stranger: UTF-8 without a byte order mark, no duplicate keys, nothing after the value, at most
/// `max_depth` levels and `max_keys` keys in all. InputError beginning with `origin`.
nlohmann::json parse_json(const std::string& text, const std::string& origin, size_t max_depth = 32,
                          size_t max_keys = 1'000'000);
/// The same with the keys in the order of the text; finding one goes through all, so not for large objects.
nlohmann::ordered_json parse_ordered_json(const std::string& text, const std::string& origin, size_t max_depth = 32,
                                          size_t max_keys = 100'000);

}  // namespace corank
