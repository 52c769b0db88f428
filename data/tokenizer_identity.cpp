#include "data/tokenizer_identity.h"

#include <bit>
#include <cstdint>
#include <filesystem>
#include <set>
#include <utility>

#include "configs/error.h"
#include "data/file.h"
#include "data/strict_json.h"
#include "data/token_file.h"

namespace corank {
namespace {

using nlohmann::json;
using Pieces = std::set<std::pair<int64_t, std::string>>;  // by id, then by bytes

constexpr int64_t kMaxBytes = int64_t{64} << 20;
constexpr size_t kMaxTokenizerDepth = 64, kMaxTokenizerKeys = 8'000'000;

/// Hashes a tokenizer.json part by part.
class Fingerprint {
 public:
  Fingerprint(const std::string& text, const std::string& origin)
      : origin_(origin),
        root_(parse_json(text, origin, kMaxTokenizerDepth, kMaxTokenizerKeys)),
        model_(member(root_, "model")) {}

  std::string hex() {
    add_tokens();
    add_merges();
    add_scores();
    return hash_.hex();
  }

 private:
  void require(bool holds, const char* where, const char* what) const {
    if (holds) return;
    std::string message = origin_;
    message.append(": ").append(where).append(what).append(". Fetch the model's tokenizer again.");
    throw InputError(message);
  }
  const json& member(const json& object, const char* key) const {
    require(object.is_object() && object.contains(key), key, " is missing");
    return object.at(key);
  }
  std::string text_of(const json& value, const char* where) const {
    require(value.is_string(), where, " holds what is no text");
    return value.get<std::string>();
  }
  int64_t id_of(const json& value, const char* where) const {
    const bool fits =
        value.is_number_unsigned() ? value.get<uint64_t>() <= uint64_t{INT64_MAX} : value.is_number_integer();
    require(fits, where, " holds an id that is no whole number below 2^63");
    return value.get<int64_t>();
  }
  /// A list that may be missing.
  static const json& list(const json& object, const char* key) {
    static const json none = json::array();
    const auto found = object.find(key);
    return found == object.end() || found->is_null() ? none : *found;
  }
  static std::string counted(const std::string& text) { return std::to_string(text.size()) + " " + text; }

  Pieces pieces() const {
    const json& vocab = member(model_, "vocab");
    require(vocab.is_object() || vocab.is_array(), "model.vocab", " is neither a table nor a list");
    Pieces result;
    if (vocab.is_object()) {
      for (const auto& [text, id] : vocab.items()) result.emplace(id_of(id, "model.vocab"), text);
    }
    for (size_t i = 0; vocab.is_array() && i < vocab.size(); ++i) {
      require(vocab[i].is_array() && vocab[i].size() == 2 && vocab[i][1].is_number(), "model.vocab",
              " holds what is no piece with its score");
      result.emplace(static_cast<int64_t>(i), text_of(vocab[i][0], "model.vocab"));
    }
    return result;
  }

  void add_tokens() {
    Pieces all = pieces();
    const json& added = list(root_, "added_tokens");
    require(added.is_array(), "added_tokens", " is no list");
    for (const json& token : added) {
      all.emplace(id_of(member(token, "id"), "added_tokens"), text_of(member(token, "content"), "added_tokens"));
    }
    for (const auto& [id, text] : all) hash_.update("t " + std::to_string(id) + " " + counted(text) + "\n");
  }

  void add_merges() {
    const json& merges = list(model_, "merges");
    require(merges.is_array(), "model.merges", " is no list");
    for (const json& merge : merges) {
      const auto [left, right] = halves(merge);
      hash_.update("m " + counted(left) + " " + counted(right) + "\n");
    }
  }

  /// "a b", or in files of recent years ["a", "b"].
  std::pair<std::string, std::string> halves(const json& merge) const {
    if (merge.is_array() && merge.size() == 2)
      return {text_of(merge[0], "model.merges"), text_of(merge[1], "model.merges")};
    const std::string text = text_of(merge, "model.merges");
    const size_t blank = text.find(' ');
    require(blank != std::string::npos, "model.merges", " holds what is no pair");
    return {text.substr(0, blank), text.substr(blank + 1)};
  }

  void add_scores() {
    const json& vocab = model_.at("vocab");
    for (size_t i = 0; vocab.is_array() && i < vocab.size(); ++i) {
      const auto bits = std::bit_cast<uint64_t>(vocab[i][1].get<double>());
      std::string line = "s ";
      for (int shift = 60; shift >= 0; shift -= 4) line += "0123456789abcdef"[bits >> shift & 15];
      hash_.update(line + "\n");
    }
  }

  const std::string& origin_;
  const json root_;
  const json& model_;
  Sha256 hash_;
};

bool same_tokenizer(const TokenizerMark& mark, const std::string& path, const std::string& hash) {
  if (mark.file == hash) return true;
  if (mark.content.empty() && mark.loaded.empty()) return false;
  const std::string own = tokenizer_fingerprint(read_file(path, kMaxBytes), path);
  return own == mark.content || own == mark.loaded;
}

}  // namespace

std::string tokenizer_fingerprint(const std::string& tokenizer_json, const std::string& origin) {
  return "sha256:" + Fingerprint(tokenizer_json, origin).hex();
}

void require_same_tokenizer(const TokenFile& tokens, const std::string& model_folder, int64_t vocab_size) {
  const std::string path = model_folder + "/tokenizer.json";
  if (tokens.tokenizer().file.empty() || !std::filesystem::exists(path)) return;
  const std::string hash = "sha256:" + sha256_of_file(path);
  if (same_tokenizer(tokens.tokenizer(), path, hash)) return;
  throw InputError(tokens.path() + ": was made with the tokenizer " + tokens.tokenizer().file +
                   " for a vocabulary of " + std::to_string(tokens.vocab_size()) + ", but " + path + " is " + hash +
                   " and the model's vocabulary has " + std::to_string(vocab_size) +
                   ": the same ids would mean other texts. Make the token file again with data/prepare --model " +
                   model_folder + ".");
}

}  // namespace corank
