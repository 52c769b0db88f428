#include "trainer/methods/pattern.h"

#include <chrono>
#include <functional>
#include <nlohmann/json.hpp>

#include "data/file.h"
#include "tests/support.h"

// Regular expressions as PEFT matches them with Python's re, and in bounded time.
namespace corank::test {
namespace {

using nlohmann::json;

/// Matches of each name, or null where the expression is refused: as the golden file has it.
template <class Rule>
json found(const std::string& text, const json& names) {
  try {
    const Rule pattern(text);
    json result = json::array();
    for (const auto& name : names) result.push_back(pattern.matches(name.get<std::string>()));
    return result;
  } catch (const ConfigError&) {
    return nullptr;
  }
}

TEST(Pattern, MatchesWhatPythonMatches) {
  const json golden_file = json::parse(read_file(golden("python_patterns.json")));
  const json& names = golden_file[0]["modules"];
  int64_t refused = 0, matched = 0;
  for (size_t i = 1; i < golden_file.size(); ++i) {
    const json& row = golden_file[i];
    const auto text = row["pattern"].get<std::string>();
    EXPECT_EQ(found<NamePattern>(text, names), row["names"]) << text;
    EXPECT_EQ(found<KeyPattern>(text, names), row["keys"]) << text << " as a key";
    refused += row["names"].is_null();
    for (const json& match : row["names"]) matched += match == true;
  }
  EXPECT_GT(refused, 30);
  EXPECT_GT(matched, 150);
}

std::string refusal(const std::function<void()>& work) {
  try {
    work();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

constexpr const char* kModule = "model.layers.0.self_attn.q_proj";

TEST(Pattern, WhatWouldTakeForeverIsRefusedAtOnce) {
  const auto start = std::chrono::steady_clock::now();
  for (const char* text : {R"((\w+\.?)+!?)", R"((.*_?)*[0-9]projx?)", R"((.*)(.*)(.*)(.*)(.*)(.*)[0-9]_)",
                           R"((?:(?:\w|\.)+)+\d\d)", R"((.|\w|[a-z])*?[0-9]x?_)"}) {
    const PatternPlace place{"some/adapter_config.json: target_modules", true};
    const auto match = [&] { NamePattern(text, place).matches(std::string(kModule) + "#"); };
    EXPECT_THROW(match(), InputError) << text;
    const std::string said = refusal(match);
    EXPECT_TRUE(said.starts_with("some/adapter_config.json: target_modules: '")) << said;
    EXPECT_NE(said.find("takes too long"), std::string::npos) << said;
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(2));
}

TEST(Pattern, PatternsOfOneTableShareTheBound) {
  const KeyPattern pattern(R"(.*.*.*.*\d\d)");
  EXPECT_FALSE(pattern.matches(kModule));
  EXPECT_THROW(pattern.matches(kModule, 1000), ConfigError);
  const KeyPattern name("model.layers.0.self_attn.q_proj");
  EXPECT_TRUE(name.matches(kModule, 1000)) << "a name written out needs few steps";
}

TEST(Pattern, LengthAndDepthAreBounded) {
  const std::string many = "(" + std::string(30'000, 'a') + "|.*q_proj)";
  EXPECT_TRUE(NamePattern(many).matches(kModule));
  for (const std::string& text : {std::string(100'000, 'a'), std::string(10'000, '(') + "a" + std::string(10'000, ')'),
                                  std::string("((a{1000}){1000}){1000}"), std::string("a{99999}")}) {
    const std::string said = refusal([&] { NamePattern{text}; });
    EXPECT_NE(said.find("is not a regular expression that can be read"), std::string::npos) << text.substr(0, 20);
    EXPECT_LT(said.size(), 400u);
  }
}

TEST(Pattern, WhatIsNotTakenOverIsRefusedByName) {
  for (const char* text : {"(?x) .* proj", "(?ix).*", "(?x:a b)"})
    EXPECT_NE(refusal([&] { NamePattern{text}; }).find("verbose mode"), std::string::npos) << text;
  EXPECT_NE(refusal([&] { NamePattern{"\\N{LATIN SMALL LETTER M}.*"}; }).find("\\N is not known"), std::string::npos);
}

TEST(Pattern, GivesANamedGroup) {
  const Pattern pattern("layers", R"((?:^|.*?\.)(l|h)\w*\.(?P<idx>\d+)\.)", Pattern::Extent::start, {});
  EXPECT_EQ(pattern.group(kModule, "idx"), "0");
  EXPECT_EQ(pattern.group("model.layers.99999999999999999999999.mlp", "idx"), "99999999999999999999999");
  EXPECT_EQ(pattern.group("lm_head", "idx"), std::nullopt);
  const Pattern commented("x", R"(.*(?#(?P<idx>\d+))", Pattern::Extent::start, {});
  EXPECT_EQ(commented.group(kModule, "idx"), std::nullopt);
}

}  // namespace
}  // namespace corank::test
