#include "data/json_object.h"

#include <gtest/gtest.h>

namespace corank {
namespace {

std::string complaint(const std::string& text) {
  try {
    JsonObject(text, "x.json").done();
  } catch (const InputError& error) {
    return error.what();
  }
  return "";
}

TEST(JsonObject, WhatIsNoStrictObjectIsRefusedBriefly) {
  const std::string deep = std::string(300'000, '[');
  const std::pair<std::string, std::string> texts[] = {
      {"[]", "not a JSON object"},
      {"", "not valid JSON"},
      {"{} x", "not valid JSON"},
      {std::string("{}\0{}", 5), "NUL"},
      {"{\"a\":1,\"a\":1}", "the key a stands twice"},
      {"{\"a\":1e400}", "not valid JSON"},
      {"{\"a\":NaN}", "not valid JSON"},
      {"{\"a\":" + deep, "nested deeper"},
      {"{\"a\":\"" + std::string(1 << 20, 'x'), "not valid JSON"},
      {"{\"" + std::string(1 << 20, 'x') + "\":1}", "..."},
      {"{\"\\u001b]0;x\":1}", "\\u001b]0;x"},
      {"{\"\xc2\x9bx\":1}", "\\u009bx"},
      {"{\"mystery\":3}", "x.json: mystery is 3, and no field of this name is known here"},
  };
  for (const auto& [text, part] : texts) {
    const std::string said = complaint(text);
    EXPECT_NE(said.find(part), std::string::npos) << text.substr(0, 80) << ": " << said;
    EXPECT_LT(said.size(), 400u);
    for (const unsigned char c : said) EXPECT_TRUE(c >= ' ' && c <= '~') << said;
  }
}

TEST(JsonObject, TypesAreExact) {
  const JsonObject object(std::string(R"({"n": 3, "f": 3.0, "b": true, "s": "3", "z": null, "l": [1, 2]})"), "x.json");
  EXPECT_EQ(object.get<int64_t>("n"), 3);
  EXPECT_EQ(object.get<double>("n"), 3);
  EXPECT_EQ(object.get<std::vector<int64_t>>("l"), (std::vector<int64_t>{1, 2}));
  for (const char* key : {"f", "b", "s", "z", "l", "absent"}) EXPECT_THROW(object.get<int64_t>(key), InputError) << key;
  for (const char* key : {"b", "s", "z"}) EXPECT_THROW(object.get<double>(key), InputError) << key;
  for (const char* key : {"n", "s", "z"}) EXPECT_THROW(object.get<bool>(key), InputError) << key;
  EXPECT_EQ(object.get<int64_t>("z", 7), 7);
  EXPECT_TRUE(object.contains("z") && object.is_null("z") && !object.has("z") && !object.contains("absent"));
  object.done();
}

}  // namespace
}  // namespace corank
