#include "configs/reader.h"

#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>

#include "configs/text.h"

namespace corank {
namespace {

constexpr size_t kMaxBytes = 1'000'000;
constexpr size_t kMaxNodes = 10'000;
constexpr size_t kMaxDepth = 32;
constexpr size_t kMaxShown = 80;

/// One value of the file. The children of a map carry their keys.
struct Node {
  enum class Kind { null, scalar, list, map };
  Kind kind = Kind::null;
  std::string place;  ///< "run.yaml:12" or "command line"
  std::string key;
  std::string text;
  bool quoted = false;
  std::vector<Node> children;

  const Node* find(const std::string& name) const {
    auto found = std::find_if(children.begin(), children.end(), [&](const Node& child) { return child.key == name; });
    return found == children.end() ? nullptr : &*found;
  }
  Node* find(const std::string& name) { return const_cast<Node*>(std::as_const(*this).find(name)); }
};

std::string join(const std::vector<std::string>& parts, const std::string& separator) {
  std::string joined;
  for (const std::string& part : parts) joined += (joined.empty() ? "" : separator) + part;
  return joined;
}

/// Text of a stranger for a message.
std::string quote(const std::string& text) { return "'" + printable(text, kMaxShown) + "'"; }

std::string describe(const Node& node) {
  switch (node.kind) {
    case Node::Kind::null:
      return "nothing";
    case Node::Kind::list:
      return "a list";
    case Node::Kind::map:
      return "a map";
    case Node::Kind::scalar:
      break;
  }
  return (node.quoted ? "the quoted text " : "") + quote(node.text);
}

/// Where a text comes from; overrides have no lines.
struct Origin {
  std::string name;
  bool has_lines;
  std::string at(int line) const { return has_lines ? name + ":" + std::to_string(line) : name; }
};

const Origin& command_line() {
  static const Origin origin{"command line", false};
  return origin;
}

/// Builds the tree, and refuses whatever makes YAML mean something else than it shows.
class TreeBuilder : public YAML::EventHandler {
 public:
  explicit TreeBuilder(const Origin& origin) : origin_(origin) {}
  Node take() { return std::move(root_); }

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (num_documents_++ > 0) refuse(mark, "a second document begins; keep one document a file");
  }
  void OnDocumentEnd() override {}
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    refuse(mark, "aliases (*name) are not accepted; write the value out");
  }
  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override { add(mark, "", anchor); }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    if (value.find('\0') != std::string::npos) refuse(mark, "a text cannot hold the character NUL; leave it out");
    if (expects_key()) {
      check(mark, tag, anchor);
      add_key(mark, value);
      return;
    }
    Node& node = add(mark, tag, anchor);
    node.kind = Node::Kind::scalar;
    node.text = value;
    node.quoted = tag == "!";
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    open(mark, add(mark, tag, anchor), Node::Kind::list);
  }
  void OnSequenceEnd() override { open_.pop_back(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    open(mark, add(mark, tag, anchor), Node::Kind::map);
  }
  void OnMapEnd() override { open_.pop_back(); }

 private:
  // A container's children only grow once the container opened inside it has ended, so the pointers stay valid.
  struct Level {
    Node* node;
    bool has_key = false;
  };

  [[noreturn]] void refuse(const YAML::Mark& mark, const std::string& message) const {
    throw ConfigError(place(mark) + ": " + message + ".");
  }
  std::string place(const YAML::Mark& mark) const { return origin_.at(mark.line + 1); }
  bool expects_key() const {
    return !open_.empty() && open_.back().node->kind == Node::Kind::map && !open_.back().has_key;
  }

  void check(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor) {
    if (anchor != YAML::NullAnchor) refuse(mark, "anchors (&name) are not accepted; write the value out");
    // yaml-cpp marks plain nodes "?" and quoted ones "!"; everything else stands in the file.
    if (!tag.empty() && tag != "?" && tag != "!") {
      refuse(mark, "the tag " + quote(tag) + " is not accepted; leave it out");
    }
    if (++num_nodes_ > kMaxNodes) refuse(mark, "more than " + std::to_string(kMaxNodes) + " values");
  }

  void add_key(const YAML::Mark& mark, const std::string& key) {
    if (key == "<<") refuse(mark, "merge keys (<<) are not accepted; write the values out");
    Node& map = *open_.back().node;
    if (const Node* first = map.find(key)) {
      refuse(mark, "the key " + quote(key) + " stands twice, first at " + first->place + "; keep one");
    }
    Node& child = map.children.emplace_back();
    child.key = key;
    child.place = place(mark);
    open_.back().has_key = true;
  }

  Node& add(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor) {
    check(mark, tag, anchor);
    if (open_.empty()) {
      root_.place = place(mark);
      return root_;
    }
    Level& level = open_.back();
    if (level.node->kind == Node::Kind::list) {
      level.node->children.emplace_back().place = place(mark);
    } else if (!level.has_key) {
      refuse(mark, "a key must be a word, not a list, a map or nothing");
    }
    level.has_key = false;
    return level.node->children.back();
  }

  void open(const YAML::Mark& mark, Node& node, Node::Kind kind) {
    if (open_.size() == kMaxDepth) refuse(mark, "nested deeper than " + std::to_string(kMaxDepth) + " levels");
    node.kind = kind;
    open_.push_back({&node});
  }

  const Origin& origin_;
  Node root_;
  std::vector<Level> open_;
  size_t num_nodes_ = 0;
  int num_documents_ = 0;
};

void check_text(const std::string& text, const Origin& origin) {
  if (text.size() > kMaxBytes) {
    throw ConfigError(origin.name + ": larger than " + std::to_string(kMaxBytes) + " bytes; this is no run file.");
  }
  int line = 1;
  for (size_t at = 0; at < text.size();) {
    const size_t length = text[at] == '\0' ? 0 : utf8_length(text, at);
    if (length == 0) throw ConfigError(origin.at(line) + ": not UTF-8 text; save the file as UTF-8.");
    line += text[at] == '\n';
    at += length;
  }
}

Node parse_tree(const std::string& text, const Origin& origin) {
  check_text(text, origin);
  TreeBuilder builder(origin);
  try {
    std::istringstream in(text);
    YAML::Parser parser(in);
    while (parser.HandleNextDocument(builder)) {
    }
  } catch (const YAML::Exception& error) {
    const std::string place = error.mark.is_null() ? origin.name : origin.at(error.mark.line + 1);
    throw ConfigError(place + ": not valid YAML: " + error.msg + ".");
  }
  return builder.take();
}

std::vector<std::string> split_path(const std::string& path) {
  std::vector<std::string> parts(1);
  for (char c : path) {
    if (c == '.') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

/// The entry `key` of `map`, made where it is absent. `parent` is the path of `map`.
Node& entry_of(Node& map, const std::string& key, const std::string& setting) {
  if (map.kind == Node::Kind::null) map.kind = Node::Kind::map;
  if (map.kind != Node::Kind::map) {
    throw ConfigError(command_line().name + ": " + quote(setting) + ": " + quote(map.key) + " holds " + describe(map) +
                      " (" + map.place + "), so nothing can be set below it; set the key itself.");
  }
  if (Node* found = map.find(key)) return *found;
  Node& made = map.children.emplace_back();
  made.key = key;
  made.place = command_line().name;
  return made;
}

/// Takes the key away that `setting` names: null stands for what the file does not say.
void remove_entry(Node& root, const std::vector<std::string>& parts, const std::string& setting) {
  Node* map = &root;
  for (size_t i = 0; map && i + 1 < parts.size(); ++i) map = map->find(parts[i]);
  if (!map || !map->find(parts.back())) {
    throw ConfigError(command_line().name + ": " + quote(setting) +
                      ": null removes a key, and the file has no such key.");
  }
  std::erase_if(map->children, [&](const Node& child) { return child.key == parts.back(); });
}

/// Whether a comment begins outside of quotes.
bool has_comment(const std::string& text) {
  char quote = 0, before = ' ';
  for (size_t i = 0; i < text.size(); ++i) {
    if (quote != 0) {
      const bool escapes = text[i] == '\\' && quote == '"';
      if (escapes) ++i;
      if (!escapes && text[i] == quote) quote = 0;
    } else if (text[i] == '#' && std::isspace(static_cast<unsigned char>(before))) {
      return true;
    } else if ((text[i] == '"' || text[i] == '\'') &&
               std::string_view(" \t\n[{,:").find(before) != std::string_view::npos) {
      quote = text[i];
    }
    before = i < text.size() ? text[i] : ' ';
  }
  return false;
}

/// False where YAML took less than was typed: it cuts at " #" and makes a map at ": ".
bool is_whole(const Node& value, const std::string& text) {
  const auto blank = [](unsigned char c) { return std::isspace(c); };
  const auto first = std::find_if_not(text.begin(), text.end(), blank);
  const auto last = std::find_if_not(text.rbegin(), text.rend(), blank).base();
  const std::string trimmed(first, std::max(first, last));
  if (has_comment(text)) return false;
  switch (value.kind) {
    case Node::Kind::null:
      return trimmed.find('#') == std::string::npos;
    case Node::Kind::scalar:
      return value.quoted ? trimmed.ends_with(trimmed.front()) : trimmed == value.text;
    case Node::Kind::list:
      return trimmed.starts_with('[') && trimmed.ends_with(']');
    case Node::Kind::map:
      return trimmed.starts_with('{') && trimmed.ends_with('}');
  }
  return true;
}

void lay_over(Node& root, const std::string& setting, std::set<std::string>& seen) {
  const auto refuse = [&](const std::string& message) {
    throw ConfigError(command_line().name + ": " + quote(setting) + ": " + message + ".");
  };
  const size_t equals = setting.find('=');
  const std::string path = setting.substr(0, equals);
  const std::vector<std::string> parts = split_path(path);
  if (equals == std::string::npos || std::find(parts.begin(), parts.end(), "") != parts.end()) {
    refuse("an override is written key=value or key.sub=value");
  }
  if (!seen.insert(path).second) refuse("this key is set twice; keep one");
  const std::string text = setting.substr(equals + 1);
  if (text.empty()) refuse("no value; an empty text is written " + path + "=\"\"");

  Node value;
  try {
    value = parse_tree(text, command_line());
  } catch (const ConfigError& error) {
    refuse("the value cannot be read: " + std::string(error.what()));
  }
  if (!is_whole(value, text)) {
    refuse(
        "YAML reads ' #' as the start of a comment and ': ' as a map; put quotes around the value that the shell "
        "leaves standing: '" +
        path + "=\"...\"'");
  }
  if (value.kind == Node::Kind::null) return remove_entry(root, parts, setting);
  Node* node = &root;
  for (const std::string& part : parts) node = &entry_of(*node, part, setting);
  value.key = node->key;
  value.place = command_line().name;
  *node = std::move(value);
}

[[noreturn]] void refuse(const Node& node, const std::string& path, const std::string& expected) {
  throw ConfigError(node.place + ": " + path + ": must be " + expected + ", found " + describe(node) + ".");
}

/// The text of a scalar without quotes, for types that YAML writes plain.
const std::string& plain_text(const Node& node, const std::string& path, const std::string& expected) {
  if (node.kind != Node::Kind::scalar || node.quoted) refuse(node, path, expected);
  return node.text;
}

/// A whole decimal number. Leading zeros are refused: YAML 1.1 reads 010 as 8.
template <class T>
bool parse_number(const std::string& text, T& value) {
  const size_t digits = text.starts_with('-') ? 1 : 0;
  if (text.size() > digits + 1 && text[digits] == '0' && std::isdigit(static_cast<unsigned char>(text[digits + 1]))) {
    return false;
  }
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  return error == std::errc() && stop == end;
}

void convert(const Node& node, const std::string& path, bool& value) {
  const std::string expected = "true or false";
  const std::string& text = plain_text(node, path, expected);
  if (text != "true" && text != "false") refuse(node, path, expected);
  value = text == "true";
}

void convert(const Node& node, const std::string& path, int64_t& value) {
  const std::string expected = "a whole number in decimal digits, within 64 bits and without quotes (such as 42)";
  if (!parse_number(plain_text(node, path, expected), value)) refuse(node, path, expected);
}

void convert(const Node& node, const std::string& path, double& value) {
  const std::string expected = "a finite decimal number without quotes (such as 0.1 or 2e-4)";
  if (!parse_number(plain_text(node, path, expected), value) || !std::isfinite(value)) refuse(node, path, expected);
}

void convert(const Node& node, const std::string& path, std::string& value) {
  if (node.kind != Node::Kind::scalar) refuse(node, path, "a text");
  value = node.text;
}

template <class T>
void convert(const Node& node, const std::string& path, std::vector<T>& values) {
  if (node.kind != Node::Kind::list) refuse(node, path, "a list (such as [a, b])");
  for (const Node& child : node.children) {
    const std::string index = std::to_string(values.size());
    convert(child, path + "[" + index + "]", values.emplace_back());
  }
}

template <class T>
void convert(const Node& node, const std::string& path, std::vector<std::pair<std::string, T>>& values) {
  if (node.kind != Node::Kind::map) refuse(node, path, "a map (such as {name: 8})");
  for (const Node& child : node.children) {
    values.emplace_back(child.key, T());
    convert(child, path + "." + child.key, values.back().second);
  }
}

template <class T>
void convert(const Node& node, const std::string& path, std::map<std::string, T>& values) {
  std::vector<std::pair<std::string, T>> ordered;
  convert(node, path, ordered);
  values.insert(ordered.begin(), ordered.end());
}

std::string suggestion(const std::string& word, const std::vector<std::string>& known) {
  const std::optional<std::string> near = nearest(word, known);
  return near ? "; did you mean '" + *near + "'?" : "";
}

}  // namespace

/// The file, and what stands for a section that it lacks.
struct Section::Tree {
  Node root;
  Node absent;
};

/// What was asked of one map.
struct Section::State {
  std::shared_ptr<const Tree> tree;  ///< owns `node`
  const Node* node;
  std::string path;
  std::string place;
  std::set<std::string> known;
  std::set<std::string> read;
  std::map<std::string, std::shared_ptr<State>> sections;

  State(std::shared_ptr<const Tree> owner, const Node* map, std::string map_path, std::string map_place)
      : tree(std::move(owner)), node(map), path(std::move(map_path)), place(std::move(map_place)) {}

  std::string full(const std::string& key) const { return path.empty() || key.empty() ? path + key : path + "." + key; }

  /// Marks `key` as read. Throws where it is absent.
  const Node& require(const std::string& key) {
    known.insert(key);
    read.insert(key);
    if (const Node* found = node->find(key)) return *found;
    std::vector<std::string> unknown;
    for (const Node& child : node->children) {
      if (!known.contains(child.key)) unknown.push_back(child.key);
    }
    const std::optional<std::string> near = nearest(key, unknown);
    throw ConfigError(place + ": " + full(key) + ": this key is required and absent; " +
                      (near ? "is '" + *near + "' (" + node->find(*near)->place + ") meant to be it?" : "add it."));
  }

  void collect_unread(std::vector<std::string>& messages) const {
    for (const Node& child : node->children) {
      if (!read.contains(child.key))
        messages.push_back(child.place + ": " + full(child.key) + ": " + reason(child.key));
    }
    for (const auto& [key, section] : sections) section->collect_unread(messages);
  }

 private:
  std::string reason(const std::string& key) const {
    if (known.contains(key)) return "this key has no effect with the other settings; remove it.";
    const std::vector<std::string> names(known.begin(), known.end());
    if (nearest(key, names)) return "unknown key" + suggestion(key, names);
    return "unknown key; remove it (known here: " + (names.empty() ? "none" : join(names, ", ")) + ").";
  }
};

Section::Section(std::shared_ptr<State> state) : state_(std::move(state)) {}

Section Section::load(const std::string& path, const std::vector<std::string>& overrides) {
  // Only regular files: opening a pipe would wait for its writer.
  std::ifstream in;
  if (std::filesystem::is_regular_file(path)) in.open(path, std::ios::binary);
  if (!in.is_open()) {
    throw MissingError(path +
                       ": the run file does not exist, cannot be read or is no regular file; give the path of a "
                       "YAML file.");
  }
  std::string text(kMaxBytes + 1, '\0');  // one byte more than allowed, so that parse() sees a file that is too large
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(in.gcount()));
  return parse(text, path, overrides);
}

Section Section::parse(const std::string& text, const std::string& origin, const std::vector<std::string>& overrides) {
  auto tree = std::make_shared<Tree>();
  Node& root = tree->root;
  root = parse_tree(text, {origin, true});
  std::set<std::string> seen;
  for (const std::string& setting : overrides) lay_over(root, setting, seen);
  if (root.kind != Node::Kind::map && root.kind != Node::Kind::null) {
    throw ConfigError(root.place + ": must hold keys with values (key: value), found " + describe(root) + ".");
  }
  return Section(std::make_shared<State>(tree, &root, "", origin));
}

bool Section::has(const std::string& key) const {
  state_->known.insert(key);
  return state_->node->find(key) != nullptr;
}

Section Section::section(const std::string& key) const {
  state_->known.insert(key);
  state_->read.insert(key);
  std::shared_ptr<State>& child = state_->sections[key];
  if (child) return Section(child);
  const Node* node = state_->node->find(key);
  if (node && node->kind != Node::Kind::map && node->kind != Node::Kind::null) {
    refuse(*node, state_->full(key), "a map (keys with values below it)");
  }
  child = std::make_shared<State>(state_->tree, node ? node : &state_->tree->absent, state_->full(key),
                                  node ? node->place : state_->place);
  return Section(child);
}

template <class T>
T Section::get(const std::string& key) const {
  T value{};
  convert(state_->require(key), state_->full(key), value);
  return value;
}

template bool Section::get(const std::string&) const;
template int64_t Section::get(const std::string&) const;
template double Section::get(const std::string&) const;
template std::string Section::get(const std::string&) const;
template std::vector<std::string> Section::get(const std::string&) const;
template std::vector<int64_t> Section::get(const std::string&) const;
template std::map<std::string, int64_t> Section::get(const std::string&) const;
template std::map<std::string, double> Section::get(const std::string&) const;

std::vector<std::pair<std::string, double>> Section::get_ordered(const std::string& key) const {
  std::vector<std::pair<std::string, double>> values;
  convert(state_->require(key), state_->full(key), values);
  return values;
}

bool Section::is_list(const std::string& key) const {
  return has(key) && state_->node->find(key)->kind == Node::Kind::list;
}

std::string Section::get_choice(const std::string& key, const std::string& default_value,
                                const std::vector<std::string>& allowed) const {
  const std::string value = get<std::string>(key, default_value);
  if (std::find(allowed.begin(), allowed.end(), value) == allowed.end()) {
    fail(key, "must be one of " + join(allowed, ", ") + ", found " + quote(value) +
                  (nearest(value, allowed) ? suggestion(value, allowed) : "."));
  }
  return value;
}

void Section::done() const {
  std::vector<std::string> messages;
  state_->collect_unread(messages);
  if (!messages.empty()) throw ConfigError(join(messages, " "));
}

std::string Section::where(const std::string& key) const {
  const Node* node = key.empty() ? nullptr : state_->node->find(key);
  const std::string path = state_->full(key);
  return (node ? node->place : state_->place) + (path.empty() ? "" : ": " + path);
}

void Section::fail(const std::string& key, const std::string& message) const {
  throw ConfigError(where(key) + ": " + message);
}

std::optional<std::string> nearest(std::string_view word, const std::vector<std::string>& known) {
  // Optimal string alignment: insert, delete, replace, swap two neighbours.
  const auto distance = [word](std::string_view other) {
    std::vector<std::vector<size_t>> d(word.size() + 1, std::vector<size_t>(other.size() + 1));
    for (size_t i = 0; i <= word.size(); ++i) {
      for (size_t j = 0; j <= other.size(); ++j) {
        if (i == 0 || j == 0) {
          d[i][j] = i + j;
          continue;
        }
        d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (word[i - 1] != other[j - 1])});
        if (i > 1 && j > 1 && word[i - 1] == other[j - 2] && word[i - 2] == other[j - 1]) {
          d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
        }
      }
    }
    return d[word.size()][other.size()];
  };
  constexpr size_t kLongestWord = 100;
  std::optional<std::string> best;
  if (word.size() > kLongestWord) return best;
  size_t smallest = std::max<size_t>(1, word.size() / 3) + 1;
  for (const std::string& candidate : known) {
    if (candidate.size() > kLongestWord) continue;
    const size_t found = distance(candidate);
    if (found < smallest && found < candidate.size()) {
      smallest = found;
      best = candidate;
    }
  }
  return best;
}

}  // namespace corank
