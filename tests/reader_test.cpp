#include "configs/reader.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>

#include "configs/text.h"
#include "configs/writer.h"

namespace corank {
namespace {

using Strings = std::vector<std::string>;

std::string config_error(const std::function<void()>& action) {
  try {
    action();
  } catch (const ConfigError& error) {
    EXPECT_EQ(error.code(), ExitCode::usage);
    return error.what();
  }
  ADD_FAILURE() << "no ConfigError";
  return "";
}

/// The text must be refused with a message that begins at `place` and contains `part`.
void expect_refused(const std::string& text, const std::string& place, const std::string& part) {
  const std::string message = config_error([&] { Section::parse(text, "run.yaml"); });
  EXPECT_EQ(message.rfind(place, 0), 0u) << message;
  EXPECT_NE(message.find(part), std::string::npos) << message;
}

template <class T>
void expect_wrong(const std::string& value) {
  const Section run = Section::parse("a: 1\nsub:\n  key: " + value + "\n", "run.yaml");
  const std::string message = config_error([&] { run.section("sub").get<T>("key"); });
  EXPECT_EQ(message.rfind("run.yaml:3: sub.key", 0), 0u) << message;
}

template <class T>
T value_of(const std::string& value) {
  return Section::parse("key: " + value, "run.yaml").get<T>("key");
}

TEST(Reader, DepthSizeAndKeysAreBounded) {
  const std::string deep(300'000, '[');
  expect_refused("a: " + std::string(40, '[') + std::string(40, ']'), "run.yaml:1", "nested deeper than 32 levels");
  expect_refused("a: " + deep, "run.yaml:1", "");  // what YAML takes for a key is refused first
  expect_refused("a: " + std::string(300'000, '{'), "run.yaml:1", "a key must be a word");
  std::string block;
  for (int i = 0; i < 40; ++i) block += std::string(static_cast<size_t>(i), ' ') + "a:\n";
  expect_refused(block, "run.yaml:33", "nested deeper than 32 levels");
  expect_refused("a: " + std::string(1'000'001, 'x'), "run.yaml", "larger than 1000000 bytes");
  std::string dashes;
  for (int i = 0; i < 100'000; ++i) dashes += "- ";
  expect_refused("a:\n  " + dashes, "run.yaml:2", "nested deeper than 32 levels");
  for (const std::string& value : {deep, std::string(300'000, '{'), "{a: " + deep, std::string(100, '[')})
    EXPECT_NE(config_error([&] { Section::parse("a: 1", "run.yaml", {"b=" + value}); }), "");
}

TEST(Reader, NulIsRefusedAndAByteOrderMarkIsNone) {
  expect_refused("a: \"x\\0y\"", "run.yaml:1", "NUL");
  expect_refused("\"x\\0y\": 1", "run.yaml:1", "NUL");
  expect_refused(std::string("a: x\0y", 7), "run.yaml:1", "not UTF-8");
  EXPECT_EQ(Section::parse("\xef\xbb\xbf"
                           "a: 1\n",
                           "run.yaml")
                .get<int64_t>("a"),
            1);
}

TEST(Reader, AnUnknownKeyOfMegabytesIsRefusedAtOnce) {
  const Section run = Section::parse("? " + std::string(900'000, 'k') + "\n: 1\n", "run.yaml");
  for (const char* key : {"model", "data", "train", "parallel"}) run.has(key);
  EXPECT_NE(config_error([&] { run.done(); }).find("unknown key"), std::string::npos);
}

/// What the writer writes is read back as it was.
TEST(Writer, TextsComeBack) {
  std::string every;
  for (char c = 1; c < 127; ++c) every += c;
  for (const std::string& text : {std::string(), std::string(" a "), std::string("a\nb: c\n# identity: x"),
                                  std::string("\ttab\r\v\f\a\b\x1b[31m"), std::string("\"quoted\" \\ back\\n"), every,
                                  std::string("\u0085 \u009b \u2028 \u2029 \ufeff \u202e \u00e4 \U0001f600"),
                                  std::string("null"), std::string("~"), std::string("<<"), std::string("- a"),
                                  std::string("&a *b !c %d @e `f"), std::string(2000, 'x')}) {
    const std::string line = "a: " + yaml::quoted(text) + "\n";
    EXPECT_EQ(line.find('\n'), line.size() - 1) << "one line";
    EXPECT_EQ(Section::parse(line, "run.yaml").get<std::string>("a"), text) << line;
    const Strings two{text, "b"};
    EXPECT_EQ(Section::parse("a: " + yaml::list(two), "run.yaml").get<Strings>("a"), two);
    if (text == "<<") continue;  // no key
    const std::vector<std::pair<std::string, double>> entries{{text, 4}, {"z", 1e30}, {"y", 0.1}};
    EXPECT_EQ(Section::parse("a: " + yaml::map(entries), "run.yaml").get_ordered("a"), entries) << line;
  }
  EXPECT_THROW(yaml::quoted("a\xff"), ConfigError);
}

TEST(Text, IsShownAndNeverObeyed) {
  EXPECT_EQ(printable("plain \u00e4 \U0001f600 'x' \\"), "plain \u00e4 \U0001f600 'x' \\");
  EXPECT_EQ(printable("\x1b[31mred\x7f\r\n\t\u009b\u202e\u2066\xff\xc3"),
            R"(\x1b[31mred\x7f\x0d\n\t\u009b\u202e\u2066\xff\xc3)");
  EXPECT_EQ(printable_lines("a\x1b\n\nb\n"), "a\\x1b\n\nb\n");
  const std::string cut = printable(std::string(1'000'000, 'a') + "end");
  EXPECT_LT(cut.size(), 4200u);
  EXPECT_NE(cut.find("bytes left out"), std::string::npos);
  EXPECT_TRUE(cut.ends_with("aend"));
  std::string umlauts;
  for (int i = 0; i < 5000; ++i) umlauts += "\u00e4";
  EXPECT_TRUE(is_utf8(printable("x" + umlauts)));
  EXPECT_EQ(printable("x" + umlauts).find("\\x"), std::string::npos) << "cut between characters";
}

TEST(Reader, ReadsEveryType) {
  const Section run = Section::parse(R"(# a comment
flag: true
steps: 100
rate: 1e-3
name: "x y"
targets: [q_proj, 'v_proj']
ranks: {b: 4, a: -2}
alphas:
  b: 0.5
  a: 2
empty:
)",
                                     "run.yaml");
  EXPECT_TRUE(run.get<bool>("flag"));
  EXPECT_EQ(run.get<int64_t>("steps"), 100);
  EXPECT_EQ(run.get<double>("rate"), 1e-3);
  EXPECT_EQ(run.get<std::string>("name"), "x y");
  EXPECT_EQ(run.get<Strings>("targets"), (Strings{"q_proj", "v_proj"}));
  EXPECT_TRUE(run.is_list("targets"));
  EXPECT_FALSE(run.is_list("name"));
  EXPECT_FALSE(run.is_list("absent"));
  EXPECT_EQ((run.get<std::map<std::string, int64_t>>("ranks")), (std::map<std::string, int64_t>{{"a", -2}, {"b", 4}}));
  EXPECT_EQ((run.get<std::map<std::string, double>>("alphas")), (std::map<std::string, double>{{"a", 2}, {"b", 0.5}}));
  EXPECT_EQ(run.get_ordered("alphas"), (std::vector<std::pair<std::string, double>>{{"b", 0.5}, {"a", 2.0}}));
  EXPECT_FALSE(run.section("empty").has("x"));
  EXPECT_EQ(run.section("absent").get<int64_t>("x", 5), 5);
  EXPECT_EQ(run.get_optional<double>("nothing"), std::nullopt);
  EXPECT_EQ(run.get_optional<double>("rate"), 1e-3);
  run.done();
}

TEST(Reader, EmptyTextIsAnEmptyMap) {
  for (const char* text : {"", "# only a comment\n"}) {
    const Section run = Section::parse(text, "run.yaml");
    EXPECT_FALSE(run.has("train"));
    EXPECT_FALSE(run.section("train").has("seed"));
    EXPECT_NO_THROW(run.done());
  }
}

TEST(Reader, BoolIsTrueOrFalse) {
  for (const char* value : {"yes", "On", "True", "1", "\"true\"", "", "~", "[true]"}) expect_wrong<bool>(value);
  EXPECT_FALSE(value_of<bool>("false"));
}

TEST(Reader, IntegersAreDecimal) {
  for (const char* value : {"010", "0x10", "+5", "1.0", "1e3", "1_000", "\"5\"", "9223372036854775808", "five", "true",
                            "5 6", "{a: 1}", "-01"}) {
    expect_wrong<int64_t>(value);
  }
  EXPECT_EQ(value_of<int64_t>("-9223372036854775808"), INT64_MIN);
  EXPECT_EQ(value_of<int64_t>("9223372036854775807"), INT64_MAX);
  EXPECT_EQ(value_of<int64_t>("0"), 0);
}

TEST(Reader, DoublesAreFiniteDecimals) {
  for (const char* value : {".nan", ".inf", "-.INF", "nan", "inf", "1e400", "1e-400", "1,5", "0x1p3", "\"0.5\"",
                            "010.5", "+1.0", "1.0x", ""}) {
    expect_wrong<double>(value);
  }
  EXPECT_EQ(value_of<double>("2E-4"), 2e-4);
  EXPECT_EQ(value_of<double>("-0.25"), -0.25);
  EXPECT_EQ(value_of<double>("3"), 3.0);
}

TEST(Reader, StringsListsAndMapsAreWhatTheyAre) {
  for (const char* value : {"[a]", "{a: b}", "", "null"}) expect_wrong<std::string>(value);
  for (const char* value : {"a", "{a: b}", "[a, [b]]", ""}) expect_wrong<Strings>(value);
  EXPECT_EQ(value_of<std::string>("\"null\""), "null");
  const Section run = Section::parse("a:\n  - x\n  - [y]\nm:\n  p: 1\n  q: z\n", "run.yaml");
  EXPECT_NE(config_error([&] { run.get<Strings>("a"); }).find("run.yaml:3: a[1]: must be a text"), std::string::npos);
  EXPECT_NE(config_error([&] { run.get_ordered("m"); }).find("run.yaml:6: m.q"), std::string::npos);
  EXPECT_NE(config_error([&] { run.section("a"); }).find("run.yaml:1: a: must be a map"), std::string::npos);
}

TEST(Reader, RefusesWhatMeansSomethingElseThanItShows) {
  expect_refused("a: 1\nb: &x 2\n", "run.yaml:2: ", "anchors");
  expect_refused("a: 1\n&k b: 2\n", "run.yaml:2: ", "anchors");
  expect_refused("&a [*a]\n", "run.yaml:1: ", "anchors");
  expect_refused("a: &x {}\n", "run.yaml:1: ", "anchors");
  expect_refused("a: &x\n", "run.yaml:1: ", "anchors");
  expect_refused("a: 1\nb: *x\n", "run.yaml:2: ", "");
  expect_refused("a: 1\n\nb: !!str 2\n", "run.yaml:3: ", "tag");
  expect_refused("a: !mine {b: 1}\n", "run.yaml:1: ", "tag");
  expect_refused("!!str a: 1\n", "run.yaml:1: ", "tag");
  expect_refused("a: 1\nb:\n  <<: {c: 2}\n", "run.yaml:3: ", "merge keys");
  expect_refused("a: 1\nb: 2\na: 3\n", "run.yaml:3: ", "'a' stands twice, first at run.yaml:1");
  expect_refused("s:\n  a: 1\n  \"a\": 3\n", "run.yaml:3: ", "stands twice");
  expect_refused("a: 1\n---\nb: 2\n", "run.yaml:", "second document");
  expect_refused("a: 1\n---\n", "run.yaml:", "second document");
  expect_refused("a: 1\n[b]: 2\n", "run.yaml:2: ", "a key must be");
  expect_refused("a: 1\n~: 2\n", "run.yaml:2: ", "a key must be");
  expect_refused("- a\n- b\n", "run.yaml:1: ", "found a list");
  expect_refused("just text\n", "run.yaml:1: ", "found 'just text'");
  expect_refused("a: 1\nb: [1, 2\n", "run.yaml:", "not valid YAML");
}

TEST(Reader, RefusesTextThatIsNotUtf8) {
  expect_refused("a: 1\nb: \xff\n", "run.yaml:2: ", "UTF-8");
  expect_refused("a: \xc0\xaf\n", "run.yaml:1: ", "UTF-8");
  expect_refused("a: \xed\xa0\x80\n", "run.yaml:1: ", "UTF-8");
  expect_refused("a: \xf4\x90\x80\x80\n", "run.yaml:1: ", "UTF-8");
  expect_refused("a: \xe2\x82", "run.yaml:1: ", "UTF-8");
  expect_refused(std::string("a: 1\nb: \0\n", 10), "run.yaml:2: ", "UTF-8");
  EXPECT_EQ(value_of<std::string>("\xe2\x82\xac \xf0\x9f\x98\x80"), "\xe2\x82\xac \xf0\x9f\x98\x80");
}

TEST(Reader, RefusesTooMuch) {
  expect_refused("a: " + std::string(33, '[') + std::string(33, ']'), "run.yaml:1: ", "nested deeper");
  expect_refused(std::string(100'000, '['), "run.yaml:1: ", "");
  expect_refused("a: " + std::string(1'000'000, 'x'), "run.yaml: ", "larger than");
  std::string list = "a: [1";
  for (int i = 0; i < 10'000; ++i) list += ",1";
  expect_refused(list + "]", "run.yaml:1: ", "more than 10000 values");
}

TEST(Reader, MessagesShowNoControlCharacters) {
  const std::string message =
      config_error([] { Section::parse("a: \"\\e[31m" + std::string(500, 'x') + "\"", "r").get<Strings>("a"); });
  EXPECT_EQ(message.find('\x1b'), std::string::npos);
  EXPECT_LT(message.size(), 250u);
}

TEST(Reader, RequiredKeyIsNamedWithTheOneThatMayBeMeant) {
  const Section run = Section::parse("train:\n  max_step: 3\n", "run.yaml");
  const std::string message = config_error([&] { run.section("train").get<int64_t>("max_steps"); });
  EXPECT_EQ(message.rfind("run.yaml:1: train.max_steps", 0), 0u) << message;
  EXPECT_NE(message.find("'max_step' (run.yaml:2)"), std::string::npos) << message;
  EXPECT_NE(config_error([&] { run.section("data").get<int64_t>("seq_len"); }).find("run.yaml: data.seq_len"),
            std::string::npos);
}

TEST(Reader, UnreadKeysAreReportedWithTheNearestKnownOne) {
  const Section run = Section::parse("train:\n  lerning_rate: 3\n  sede: 1\n  max_steps: 5\nzzz: {q: 1}\n", "run.yaml");
  const Section train = run.section("train");
  EXPECT_EQ(train.get<double>("learning_rate", 1.0), 1.0);
  EXPECT_EQ(train.get_optional<int64_t>("seed"), std::nullopt);
  EXPECT_EQ(run.section("train").get<int64_t>("max_steps"), 5);  // a second handle shares what was read
  const std::string message = config_error([&] { run.done(); });
  EXPECT_NE(message.find("run.yaml:2: train.lerning_rate: unknown key; did you mean 'learning_rate'?"),
            std::string::npos)
      << message;
  EXPECT_NE(message.find("run.yaml:3: train.sede: unknown key; did you mean 'seed'?"), std::string::npos) << message;
  EXPECT_NE(message.find("run.yaml:5: zzz: unknown key; remove it (known here: train)"), std::string::npos) << message;
  EXPECT_EQ(message.find("max_steps:"), std::string::npos) << message;
}

TEST(Reader, KeyThatWasOnlyAskedForIsUnread) {
  const Section run = Section::parse("warmup_steps: 5\n", "run.yaml");
  EXPECT_TRUE(run.has("warmup_steps"));
  EXPECT_NE(config_error([&] { run.done(); }).find("run.yaml:1: warmup_steps: this key has no effect"),
            std::string::npos);
}

TEST(Reader, UnreadKeysDeepDown) {
  const Section run = Section::parse("a:\n  b:\n    c: 1\n    d: 2\n", "run.yaml");
  run.section("a").section("b").get<int64_t>("c");
  EXPECT_NE(config_error([&] { run.done(); }).find("run.yaml:4: a.b.d: unknown key"), std::string::npos);
}

TEST(Reader, NullIsNoDefault) {
  const Section run = Section::parse("steps:\n", "run.yaml");
  EXPECT_NE(config_error([&] { run.get<int64_t>("steps", 5); }).find("found nothing"), std::string::npos);
}

TEST(Reader, Choice) {
  const Section run = Section::parse("dtype: bfloat61\n", "run.yaml");
  const Strings allowed{"float32", "bfloat16"};
  const std::string message = config_error([&] { run.get_choice("dtype", "bfloat16", allowed); });
  EXPECT_EQ(message, "run.yaml:1: dtype: must be one of float32, bfloat16, found 'bfloat61'; did you mean 'bfloat16'?");
  EXPECT_EQ(run.get_choice("other", "float32", allowed), "float32");
}

TEST(Reader, OverridesReplaceAndCreate) {
  const Section run =
      Section::parse("train:\n  seed: 1\n  list: [a, b]\nempty:\n", "run.yaml",
                     {"train.seed=7", "train.list=[c]", "new.sub.key=\"a=b\"", "empty.x=1e-3", "train.map={k: 2}"});
  const Section train = run.section("train");
  EXPECT_EQ(train.get<int64_t>("seed"), 7);
  EXPECT_EQ(train.get<Strings>("list"), Strings{"c"});
  EXPECT_EQ((train.get<std::map<std::string, int64_t>>("map")), (std::map<std::string, int64_t>{{"k", 2}}));
  EXPECT_EQ(run.section("new").section("sub").get<std::string>("key"), "a=b");
  EXPECT_EQ(run.section("empty").get<double>("x"), 1e-3);
  EXPECT_EQ(train.where("seed"), "command line: train.seed");
  EXPECT_EQ(run.section("new").where("sub"), "command line: new.sub");
  EXPECT_EQ(run.section("new").section("sub").where(), "command line: new.sub");
  run.done();
}

TEST(Reader, OverridesLaidOverNothing) {
  EXPECT_EQ(Section::parse("", "run.yaml", {"a.b=3"}).section("a").get<int64_t>("b"), 3);
}

TEST(Reader, NullTakesAKeyAway) {
  const std::string file = "train:\n  max_steps: 1\n  seed: 2\n";
  const Section run = Section::parse(file, "run.yaml", {"train.max_steps=null"});
  EXPECT_FALSE(run.section("train").has("max_steps"));
  EXPECT_EQ(run.section("train").get<int64_t>("seed"), 2);
  for (const char* bad : {"train.steps=null", "train.max_steps.deeper=~", "model.path=null"}) {
    const std::string text = config_error([&] { Section::parse(file, "run.yaml", {bad}); });
    EXPECT_NE(text.find("no such key"), std::string::npos) << text;
  }
}

TEST(Reader, OverridesAreCheckedLikeTheFile) {
  const auto message = [](const Strings& overrides) {
    return config_error([&] { Section::parse("train:\n  seed: 1\n", "run.yaml", overrides).done(); });
  };
  for (const char* bad : {"train.seed", "=3", "train..seed=3", ".seed=1", "train.=1", "train.seed=", "train.seed=[1",
                          "train.seed=&a 3", "train.seed={a: 1, a: 2}", "train.seed.deeper=3", "train.seed=!!int 3"}) {
    const std::string text = message({bad});
    EXPECT_EQ(text.rfind("command line: '" + std::string(bad) + "'", 0), 0u) << text;
  }
  EXPECT_NE(message({"train.seed=1", "train.seed=2"}).find("set twice"), std::string::npos);
  EXPECT_NE(message({"train.seed.deeper=3"}).find("run.yaml:2"), std::string::npos);
  const Section run = Section::parse("train:\n  seed: 1\n", "run.yaml", {"train.sed=4"});
  run.section("train").get<int64_t>("seed");
  EXPECT_EQ(config_error([&] { run.done(); }), "command line: train.sed: unknown key; did you mean 'seed'?");
}

TEST(Reader, OverridesAreReadAsAWholeOrRefused) {
  for (const char* bad :
       {"out=run #2", "out=\"run\" #2", "out=a: b", "out=#2", "out=[a] # b", "out=- a", "out=null # x"}) {
    const std::string text = config_error([&] { Section::parse("out: x\n", "run.yaml", {bad}); });
    EXPECT_NE(text.find("put quotes around the value"), std::string::npos) << text;
  }
  const auto value = [](const char* text) { return Section::parse("", "run.yaml", {text}).get<std::string>("out"); };
  EXPECT_EQ(value("out=\"run #2\""), "run #2");
  EXPECT_EQ(value("out='a: b'"), "a: b");
  EXPECT_EQ(value("out=run#2"), "run#2");
  EXPECT_EQ(value("out= a:b "), "a:b");
}

TEST(Reader, WhereAndFail) {
  const Section run = Section::parse("a: 1\ntrain:\n  seed: 1\n", "run.yaml");
  EXPECT_EQ(run.where("a"), "run.yaml:1: a");
  EXPECT_EQ(run.where(), "run.yaml");
  EXPECT_EQ(run.section("train").where("seed"), "run.yaml:3: train.seed");
  EXPECT_EQ(run.section("train").where("absent"), "run.yaml:2: train.absent");
  EXPECT_EQ(config_error([&] { run.section("train").fail("seed", "must be odd."); }),
            "run.yaml:3: train.seed: must be odd.");
}

TEST(Reader, LoadsFiles) {
  const std::string folder = testing::TempDir() + "corank_reader_" + std::to_string(getpid());
  std::filesystem::create_directories(folder);
  const std::string path = folder + "/run.yaml";
  std::ofstream(path) << "a: 1\nb: x\n";
  const Section run = Section::load(path, {"a=2"});
  EXPECT_EQ(run.get<int64_t>("a"), 2);
  EXPECT_EQ(run.where("b"), path + ":2: b");
  EXPECT_THROW(Section::load(folder + "/absent.yaml"), MissingError);
  EXPECT_THROW(Section::load(folder), MissingError);
  std::ofstream(path) << std::string(1'000'001, ' ');
  EXPECT_THROW(Section::load(path), ConfigError);
  std::filesystem::remove_all(folder);
}

TEST(Nearest, SuggestsOnlyWhatIsNear) {
  const Strings known{"learning_rate", "seed", "r"};
  EXPECT_EQ(nearest("learning_rat", known), "learning_rate");
  EXPECT_EQ(nearest("sede", known), "seed");
  EXPECT_EQ(nearest("warmup", known), std::nullopt);
  EXPECT_EQ(nearest("x", known), std::nullopt);
  EXPECT_EQ(nearest("seed", {}), std::nullopt);
}

}  // namespace
}  // namespace corank
