#include "data/json_object.h"

#include <algorithm>

#include "data/strict_json.h"

namespace corank {

using nlohmann::ordered_json;

std::string shown(const ordered_json& value) {
  constexpr size_t kMost = 80;
  const std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true);
  return text.size() <= kMost ? text : text.substr(0, kMost - 3) + "...";
}

std::string shown_key(const std::string& key) {
  constexpr size_t kMost = 80;
  const auto plain = [](unsigned char c) { return std::isalnum(c) || c == '.' || c == '_' || c == '-'; };
  const bool harmless = !key.empty() && key.size() <= kMost && std::all_of(key.begin(), key.end(), plain);
  return harmless ? key : shown(key);
}

JsonObject::JsonObject(const std::string& text, std::string origin)
    : origin_(std::move(origin)), root_(parse_ordered_json(text, origin_)) {
  if (!root_.is_object()) fail("not a JSON object");
}

JsonObject::JsonObject(ordered_json object, std::string origin)
    : origin_(std::move(origin)), root_(std::move(object)) {}

const ordered_json* JsonObject::find(const std::string& key) const {
  known_.insert(key);
  const auto found = root_.find(key);
  return found == root_.end() ? nullptr : &*found;
}

const ordered_json& JsonObject::value(const std::string& key) const {
  static const ordered_json none;
  const ordered_json* found = find(key);
  return found ? *found : none;
}

std::vector<std::string> JsonObject::unknown() const {
  std::vector<std::string> keys;
  for (const auto& item : root_.items()) {
    if (!known_.contains(item.key())) keys.push_back(item.key());
  }
  return keys;
}

void JsonObject::done() const {
  const std::vector<std::string> keys = unknown();
  if (keys.empty()) return;
  fail(shown_key(keys.front()) + " is " + shown(root_[keys.front()]) +
       ", and no field of this name is known here; it may change the result. Remove it if it does not");
}

void JsonObject::refuse(const ordered_json& value, const std::string& key, const char* wanted) const {
  fail(key + " is " + shown(value) + ", not " + wanted);
}

}  // namespace corank
