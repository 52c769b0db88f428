#pragma once
#include <string>

namespace corank {

class TokenFile;

/// "sha256:<hex>" of what decides the ids of a tokenizer.json: its tokens, added ones too, with their ids, its merges,
/// and the scores of a Unigram vocabulary. However the file is laid out, the same tokenizer has the same one.
/// data/prepare writes it into token files. InputError, beginning with `origin`, where the text is no tokenizer.
std::string tokenizer_fingerprint(const std::string& tokenizer_json, const std::string& origin);

/// InputError unless the ids of `tokens` are those of the tokenizer in `model_folder`, whose vocabulary has
/// `vocab_size` entries. A file that names no tokenizer and a folder without tokenizer.json have nothing to compare.
void require_same_tokenizer(const TokenFile& tokens, const std::string& model_folder, int64_t vocab_size);

}  // namespace corank
