#include "data/safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "configs/error.h"
#include "data/json_object.h"
#include "data/strict_json.h"

namespace corank {
namespace {

using nlohmann::json;

static_assert(std::endian::native == std::endian::little, "the format is little-endian and read without conversion");

constexpr int64_t kLengthBytes = 8;
constexpr int64_t kMaxHeaderBytes = int64_t{16} << 20;
constexpr size_t kMaxTensors = 200'000;
constexpr size_t kMaxHeaderKeys = 5 * kMaxTensors;
constexpr size_t kMaxNameBytes = 512;
constexpr size_t kMaxDimensions = 8;
constexpr size_t kMaxHeaderDepth = 4;
constexpr size_t kAlignment = 8;
const char* const kMetadata = "__metadata__";

struct TypeName {
  at::ScalarType type;
  const char* name;
};
constexpr TypeName kSafetensorsTypes[] = {{at::kDouble, "F64"}, {at::kFloat, "F32"}, {at::kBFloat16, "BF16"},
                                          {at::kHalf, "F16"},   {at::kLong, "I64"},  {at::kInt, "I32"},
                                          {at::kChar, "I8"},    {at::kByte, "U8"},   {at::kBool, "BOOL"}};

bool good_name(const std::string& name) {
  const auto good = [](unsigned char c) { return std::isalnum(c) || c == '.' || c == '_' || c == '-'; };
  return !name.empty() && name.size() <= kMaxNameBytes && std::all_of(name.begin(), name.end(), good);
}

/// Bytes of a tensor; false if they do not fit 64 bits, or would not where an empty dimension held one element.
bool count_bytes(const TensorInfo& info, int64_t& bytes) {
  bytes = static_cast<int64_t>(c10::elementSize(info.dtype));
  bool is_empty = false;
  for (const int64_t size : info.shape) {
    if (__builtin_mul_overflow(bytes, std::max<int64_t>(size, 1), &bytes)) return false;
    is_empty = is_empty || size == 0;
  }
  if (is_empty) bytes = 0;
  return true;
}

/// Reads one header. Everything it throws begins with the file and, inside an entry, the tensor.
class Header {
 public:
  Header(std::string origin, int64_t data_begin, int64_t file_bytes)
      : origin_(std::move(origin)), data_begin_(data_begin), data_bytes_(file_bytes - data_begin) {}

  [[noreturn]] void refuse(const std::string& message) const {
    throw InputError(origin_ + ": " + message +
                     ". The file is damaged or not a safetensors file that corank reads; fetch or write it again.");
  }

  void parse(const std::string& text, std::map<std::string, TensorInfo>& tensors,
             std::map<std::string, std::string>& metadata) const {
    if (text.empty() || text[0] != '{') refuse("the header does not begin with {");
    const json header = parse_json(text, origin_, kMaxHeaderDepth, kMaxHeaderKeys);
    for (const auto& [name, value] : header.items()) {
      if (name == kMetadata) {
        metadata = parse_metadata(value);
      } else {
        if (!good_name(name)) refuse("a tensor has the name " + shown(name));
        tensors.emplace(name, parse_tensor(name, value));
      }
    }
    if (tensors.size() > kMaxTensors) refuse("more than " + std::to_string(kMaxTensors) + " tensors");
    check_layout(tensors);
  }

 private:
  std::map<std::string, std::string> parse_metadata(const json& value) const {
    if (!value.is_object()) refuse("__metadata__ is not a map");
    std::map<std::string, std::string> metadata;
    for (const auto& [key, text] : value.items()) {
      if (!text.is_string()) refuse("__metadata__ holds something else than strings");
      metadata.emplace(key, text.get<std::string>());
    }
    return metadata;
  }

  /// A list of whole numbers in [0, 2^63).
  std::vector<int64_t> parse_numbers(const std::string& what, const json& value) const {
    if (!value.is_array()) refuse(what + " is not a list");
    std::vector<int64_t> numbers;
    for (const json& item : value) {
      if (!item.is_number_unsigned() || item.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) {
        refuse(what + " holds " + shown(item) + ", which is no whole number from 0 to 2^63 - 1");
      }
      numbers.push_back(item.get<int64_t>());
    }
    return numbers;
  }

  at::ScalarType parse_type(const std::string& tensor, const json& value) const {
    std::string allowed;
    for (const auto& [type, name] : kSafetensorsTypes) {
      if (value == name) return type;
      allowed += std::string(allowed.empty() ? "" : ", ") + name;
    }
    refuse(tensor + ": dtype " + shown(value) + " is not one of " + allowed);
  }

  TensorInfo parse_tensor(const std::string& name, const json& value) const {
    const std::string tensor = "tensor " + name;
    const bool complete = value.is_object() && value.size() == 3 && value.contains("dtype") &&
                          value.contains("shape") && value.contains("data_offsets");
    if (!complete) refuse(tensor + ": must have exactly dtype, shape and data_offsets");
    TensorInfo info{parse_type(tensor, value["dtype"]), parse_numbers(tensor + ": shape", value["shape"])};
    if (info.shape.size() > kMaxDimensions)
      refuse(tensor + ": more than " + std::to_string(kMaxDimensions) + " dimensions");
    const std::vector<int64_t> offsets = parse_numbers(tensor + ": data_offsets", value["data_offsets"]);
    if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > data_bytes_) {
      refuse(tensor + ": data_offsets " + shown(value["data_offsets"]) + " do not lie within the file's " +
             std::to_string(data_bytes_) + " data bytes");
    }
    int64_t bytes = 0;
    info.bytes = offsets[1] - offsets[0];
    info.begin = data_begin_ + offsets[0];
    if (!count_bytes(info, bytes) || bytes != info.bytes) {
      refuse(tensor + ": shape " + shown(value["shape"]) + " of " + shown(value["dtype"]) + " does not take " +
             std::to_string(info.bytes) + " bytes");
    }
    return info;
  }

  /// Every data byte belongs to exactly one tensor.
  void check_layout(const std::map<std::string, TensorInfo>& tensors) const {
    std::vector<std::pair<const TensorInfo*, const std::string*>> order;
    for (const auto& [name, info] : tensors) order.emplace_back(&info, &name);
    std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
      return std::pair(a.first->begin, a.first->bytes) < std::pair(b.first->begin, b.first->bytes);
    });
    int64_t end = data_begin_;
    for (const auto& [info, name] : order) {
      if (info->begin != end) {
        refuse("tensor " + *name + " begins at data byte " + std::to_string(info->begin - data_begin_) +
               ", but the one before it ends at " + std::to_string(end - data_begin_));
      }
      end += info->bytes;
    }
    if (end != data_begin_ + data_bytes_) {
      refuse("the tensors take " + std::to_string(end - data_begin_) + " bytes, but the file has " +
             std::to_string(data_bytes_));
    }
  }

  std::string origin_;
  int64_t data_begin_, data_bytes_;
};

}  // namespace

SafetensorsFile::SafetensorsFile(const std::string& path)
    : path_(path),
      fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {  // a pipe is refused below, not waited for
  if (fd_ < 0) {
    throw MissingError(path + ": cannot be opened: " + std::generic_category().message(errno) + ". Check the path.");
  }
  try {
    read_header();
  } catch (...) {
    ::close(fd_);
    throw;
  }
}

SafetensorsFile::~SafetensorsFile() { ::close(fd_); }

void SafetensorsFile::read_header() {
  struct stat status {};
  if (::fstat(fd_, &status) != 0 || !S_ISREG(status.st_mode)) {
    throw MissingError(path_ + ": is no regular file. Name a safetensors file.");
  }
  const int64_t file_bytes = status.st_size;
  uint64_t length = 0;
  if (file_bytes < kLengthBytes) Header(path_, 0, file_bytes).refuse("shorter than its 8 length bytes");
  read_bytes(0, kLengthBytes, reinterpret_cast<char*>(&length));
  const int64_t most = std::min(kMaxHeaderBytes, file_bytes - kLengthBytes);
  if (length > static_cast<uint64_t>(most)) {
    Header(path_, 0, file_bytes)
        .refuse("the header claims " + std::to_string(length) + " bytes, at most " + std::to_string(most) + " can be");
  }
  std::string text(length, '\0');
  read_bytes(kLengthBytes, static_cast<int64_t>(length), text.data());
  Header(path_, kLengthBytes + static_cast<int64_t>(length), file_bytes).parse(text, tensors_, metadata_);
}

void SafetensorsFile::read_bytes(int64_t offset, int64_t size, char* to) const {
  while (size > 0) {
    const ssize_t count = ::pread(fd_, to, static_cast<size_t>(size), offset);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) {
      const std::string cause = count < 0 ? std::generic_category().message(errno) : "the file has become shorter";
      throw InputError(path_ + ": cannot be read at byte " + std::to_string(offset) + ": " + cause +
                       ". Check the disk, and that nothing writes to the file.");
    }
    offset += count;
    size -= count;
    to += count;
  }
}

const TensorInfo& SafetensorsFile::info(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) throw InputError(path_ + ": has no tensor " + name + ".");
  return found->second;
}

at::Tensor SafetensorsFile::read(const std::string& name) const {
  const TensorInfo& tensor = info(name);
  at::Tensor result = at::empty(tensor.shape, tensor.dtype);
  read_bytes(tensor.begin, tensor.bytes, static_cast<char*>(result.mutable_data_ptr()));
  bytes_read_ += tensor.bytes;
  return result;
}

at::Tensor SafetensorsFile::read_slice(const std::string& name, int64_t dim, int64_t start, int64_t length) const {
  const TensorInfo& tensor = info(name);
  const int64_t rank = static_cast<int64_t>(tensor.shape.size());
  if (dim < 0 || dim >= rank || start < 0 || length < 0 || start > tensor.shape[dim] - length) {
    throw InternalError(path_ + ": tensor " + name + " has no slice [" + std::to_string(start) + ", " +
                        std::to_string(start) + " + " + std::to_string(length) + ") of dimension " +
                        std::to_string(dim) + ".");
  }
  std::vector<int64_t> shape = tensor.shape;
  shape[dim] = length;
  at::Tensor result = at::empty(shape, tensor.dtype);
  if (result.numel() == 0) return result;
  int64_t outer = 1;
  for (int64_t d = 0; d < dim; ++d) outer *= shape[d];
  const int64_t row = tensor.bytes / outer;       // bytes of one index of the dimensions before `dim`
  const int64_t inner = row / tensor.shape[dim];  // bytes of one index of `dim`
  const int64_t piece = length == tensor.shape[dim] ? outer * row : length * inner;
  char* to = static_cast<char*>(result.mutable_data_ptr());
  const int64_t total = static_cast<int64_t>(result.nbytes());
  for (int64_t done = 0, offset = tensor.begin + start * inner; done < total; done += piece, offset += row) {
    read_bytes(offset, piece, to + done);
  }
  bytes_read_ += total;
  return result;
}

std::string safetensors_header(const std::vector<std::pair<std::string, TensorInfo>>& tensors,
                               const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header[kMetadata] = metadata;
  int64_t end = 0;
  for (const auto& [name, info] : tensors) {
    const auto type = std::find_if(std::begin(kSafetensorsTypes), std::end(kSafetensorsTypes),
                                   [&wanted = info.dtype](const TypeName& known) { return known.type == wanted; });
    int64_t bytes = 0;
    if (type == std::end(kSafetensorsTypes) || !good_name(name) || name == kMetadata || header.contains(name) ||
        info.shape.size() > kMaxDimensions || !count_bytes(info, bytes)) {
      throw InternalError("tensor " + name + " of type " + c10::toString(info.dtype) +
                          " cannot be written as safetensors: the type, the name (doubled or with characters other "
                          "than letters, digits, '.', '_' and '-') or the shape is not accepted.");
    }
    header[name] = {{"dtype", type->name}, {"shape", info.shape}, {"data_offsets", {end, end + bytes}}};
    end += bytes;
  }
  std::string text = header.dump();
  text.append((kAlignment - text.size() % kAlignment) % kAlignment, ' ');
  const uint64_t length = text.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + text;
}

std::string safetensors_image(const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                              const std::map<std::string, std::string>& metadata) {
  std::vector<std::pair<std::string, TensorInfo>> infos;
  size_t bytes = 0;
  for (const auto& [name, tensor] : tensors) {
    infos.emplace_back(name, TensorInfo{tensor.scalar_type(), tensor.sizes().vec()});
    bytes += tensor.nbytes();
  }
  std::string image = safetensors_header(infos, metadata);
  image.reserve(image.size() + bytes);
  for (const auto& [name, tensor] : tensors) {
    const at::Tensor data = tensor.detach().cpu().contiguous();
    image.append(static_cast<const char*>(data.const_data_ptr()), data.nbytes());
  }
  return image;
}

}  // namespace corank
