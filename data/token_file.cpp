#include "data/token_file.h"

#include <algorithm>
#include <ctime>
#include <optional>

#include "configs/error.h"
#include "data/file.h"
#include "data/h5.h"

namespace corank {
namespace {

constexpr const char* kFormat = "corank-tokens";
constexpr int64_t kVersion = 1;
constexpr int64_t kBytesPerToken = sizeof(int32_t) + sizeof(uint8_t);
constexpr int64_t kBlockTokens = int64_t{1} << 24;

[[noreturn]] void refuse(const std::string& path, const std::string& message) {
  std::string text = path + ": " + message;
  text += ". Make the token file again with data/prepare.";
  throw InputError(text);
}

int64_t check_vector(const h5::Reader& reader, const std::string& name, at::ScalarType type) {
  const std::vector<int64_t> shape = reader.shape(name);
  if (shape.size() != 1 || reader.dtype(name) != type) {
    refuse(reader.origin(), "/" + name + " must be a vector of " + c10::toString(type));
  }
  return shape[0];
}

void check_format(const h5::Reader& reader) {
  if (!reader.has_attribute("format") || reader.attribute_string("format") != kFormat) {
    refuse(reader.origin(), std::string("is no token file: its attribute format must be ") + kFormat);
  }
  if (const int64_t version = reader.attribute_int("version"); version != kVersion) {
    refuse(reader.origin(),
           "has version " + std::to_string(version) + ", version " + std::to_string(kVersion) + " is read");
  }
}

std::vector<int64_t> read_offsets(const h5::Reader& reader, int64_t num_tokens) {
  if (check_vector(reader, "offsets", at::kLong) < 2) refuse(reader.origin(), "holds no sample");
  const at::Tensor tensor = reader.read("offsets");
  const int64_t* data = tensor.const_data_ptr<int64_t>();
  std::vector<int64_t> offsets(data, data + tensor.numel());
  if (offsets.front() != 0 || offsets.back() != num_tokens) {
    refuse(reader.origin(), "/offsets go from " + std::to_string(offsets.front()) + " to " +
                                std::to_string(offsets.back()) + ", and must go from 0 to the number of tokens, " +
                                std::to_string(num_tokens));
  }
  for (size_t i = 0; i + 1 < offsets.size(); ++i) {
    if (offsets[i] >= offsets[i + 1]) {
      refuse(reader.origin(), "sample " + std::to_string(i) + " goes from token " + std::to_string(offsets[i]) +
                                  " to " + std::to_string(offsets[i + 1]) + "; offsets must increase");
    }
  }
  return offsets;
}

std::string_view bytes_of(const at::Tensor& tensor) {
  return {static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes()};
}

/// The end of the samples that are read together, from `first` on: a block of tokens, or one longer sample.
int64_t block_end(const std::vector<int64_t>& offsets, int64_t first) {
  const auto limit = std::upper_bound(offsets.begin() + first, offsets.end(), offsets[first] + kBlockTokens);
  return std::max<int64_t>(first + 1, limit - offsets.begin() - 1);
}

TokenizerMark read_tokenizer(const h5::Reader& reader) {
  const auto read = [&](const char* name) {
    const std::string value = reader.has_attribute(name) ? reader.attribute_string(name) : "none";
    return value == "none" ? std::string() : value;
  };
  return {read("tokenizer"), read("tokenizer_content"), read("tokenizer_loaded")};
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  char text[32];
  return std::string(text, std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", &parts));
}

}  // namespace

struct TokenFile::Impl {
  std::optional<h5::Reader> reader;  ///< while tokens and mask are not in memory
  at::Tensor tokens, mask;

  at::Tensor read_mask(int64_t begin, int64_t end) const {
    return reader ? reader->read_range("loss_mask", begin, end) : mask.narrow(0, begin, end - begin);
  }
  /// Tokens [begin, end) of the file.
  Sample read(int64_t begin, int64_t end) const {
    return {reader ? reader->read_range("tokens", begin, end) : tokens.narrow(0, begin, end - begin),
            read_mask(begin, end)};
  }
};

TokenFile::TokenFile(const std::string& path, int64_t memory_limit) : path_(path), impl_(std::make_unique<Impl>()) {
  h5::Reader reader(path);
  check_format(reader);
  vocab_size_ = reader.attribute_int("vocab_size");
  if (vocab_size_ < 1) refuse(path, "has vocab_size " + std::to_string(vocab_size_) + ", which must be at least 1");
  tokenizer_ = read_tokenizer(reader);
  const int64_t num_tokens = check_vector(reader, "tokens", at::kInt);
  if (const int64_t num_masks = check_vector(reader, "loss_mask", at::kByte); num_masks != num_tokens) {
    refuse(path, "has " + std::to_string(num_tokens) + " tokens and " + std::to_string(num_masks) + " mask entries");
  }
  offsets_ = read_offsets(reader, num_tokens);
  if (num_tokens <= memory_limit / kBytesPerToken) {
    impl_->tokens = reader.read("tokens");
    impl_->mask = reader.read("loss_mask");
  } else {
    impl_->reader.emplace(std::move(reader));
  }
}

TokenFile::~TokenFile() = default;

Sample TokenFile::read(int64_t sample) const {
  if (sample < 0 || sample >= size()) {
    throw InternalError(path_ + ": no sample " + std::to_string(sample) + " among " + std::to_string(size()) + ".");
  }
  Sample result = impl_->read(offsets_[sample], offsets_[sample + 1]);
  result.number = sample;
  return result;
}

std::vector<int64_t> TokenFile::num_targets(int64_t seq_len) const {
  std::vector<int64_t> numbers;
  for (int64_t first = 0, last = 0; first < size(); first = last) {
    last = block_end(offsets_, first);
    const at::Tensor block = impl_->read_mask(offsets_[first], offsets_[last]);
    for (int64_t i = first; i < last; ++i) {
      const uint8_t* mask = block.const_data_ptr<uint8_t>() + (offsets_[i] - offsets_[first]);
      const uint8_t* end = mask + std::min(length(i), seq_len);
      numbers.push_back(std::count_if(mask + 1, end, [](uint8_t entry) { return entry != 0; }));
    }
  }
  return numbers;
}

std::string TokenFile::fingerprint() const {
  // The offsets end with the number of tokens, so the parts cannot be told apart in two ways.
  Sha256 offsets, tokens, mask;
  offsets.update({reinterpret_cast<const char*>(offsets_.data()), offsets_.size() * sizeof(int64_t)});
  for (int64_t begin = 0; begin < num_tokens(); begin += kBlockTokens) {
    const Sample block = impl_->read(begin, std::min(begin + kBlockTokens, num_tokens()));
    tokens.update(bytes_of(block.tokens));
    mask.update(bytes_of(block.loss_mask));
  }
  return sha256(offsets.hex() + tokens.hex() + mask.hex());
}

namespace {

void validate_sample(const std::string& path, int64_t number, const int32_t* tokens, const uint8_t* mask,
                     int64_t length, int64_t vocab_size) {
  const auto refuse_token = [&](int64_t i, const std::string& message) {
    refuse(path, "sample " + std::to_string(number) + ", token " + std::to_string(i) + ": " + message);
  };
  bool has_target = false;
  for (int64_t i = 0; i < length; ++i) {
    if (tokens[i] < 0 || tokens[i] >= vocab_size) {
      refuse_token(i, "id " + std::to_string(tokens[i]) + " is outside the model's vocabulary [0, " +
                          std::to_string(vocab_size) + "); was another tokenizer used");
    }
    if (mask[i] > 1) refuse_token(i, "loss_mask is " + std::to_string(mask[i]) + ", allowed are 0 and 1");
    has_target |= i > 0 && mask[i] == 1;
  }
  if (!has_target) {
    refuse(path, "sample " + std::to_string(number) + " of " + std::to_string(length) +
                     " tokens has no target after its first token, so nothing can be learned from it");
  }
}

}  // namespace

void TokenFile::validate(int64_t vocab_size) const {
  if (vocab_size_ > vocab_size) {
    refuse(path_, "was made for a vocabulary of " + std::to_string(vocab_size_) + ", but the model's has " +
                      std::to_string(vocab_size));
  }
  for (int64_t first = 0, last = 0; first < size(); first = last) {
    last = block_end(offsets_, first);
    const Sample block = impl_->read(offsets_[first], offsets_[last]);
    const int32_t* tokens = block.tokens.const_data_ptr<int32_t>();
    const uint8_t* mask = block.loss_mask.const_data_ptr<uint8_t>();
    for (int64_t i = first; i < last; ++i) {
      const int64_t at = offsets_[i] - offsets_[first];
      validate_sample(path_, i, tokens + at, mask + at, length(i), vocab_size);
    }
  }
}

std::string token_file_image(const std::vector<Sample>& samples, int64_t vocab_size, const std::string& source) {
  std::vector<at::Tensor> tokens{at::empty({0}, at::kInt)}, masks{at::empty({0}, at::kByte)};
  at::Tensor offsets = at::zeros({static_cast<int64_t>(samples.size()) + 1}, at::kLong);
  int64_t* offset = offsets.mutable_data_ptr<int64_t>();
  for (size_t i = 0; i < samples.size(); ++i) {
    tokens.push_back(samples[i].tokens);
    masks.push_back(samples[i].loss_mask);
    offset[i + 1] = offset[i] + samples[i].tokens.numel();
  }
  h5::Writer writer;
  writer.write("tokens", at::cat(tokens).to(at::kInt));
  writer.write("offsets", offsets);
  writer.write("loss_mask", at::cat(masks).to(at::kByte));
  writer.attribute("format", kFormat);
  writer.attribute("version", kVersion);
  writer.attribute("vocab_size", vocab_size);
  writer.attribute("tokenizer", "none");
  writer.attribute("source", source);
  writer.attribute("created", utc_now());
  return writer.finish();
}

}  // namespace corank
