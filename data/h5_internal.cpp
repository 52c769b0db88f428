#include "data/h5_internal.h"

#include <spdlog/spdlog.h>

#include <bit>
#include <cstring>
#include <utility>

#include "configs/error.h"

namespace corank::h5 {
namespace {

static_assert(std::endian::native == std::endian::little, "files are little-endian and read without conversion");

constexpr size_t kImageGrowth = size_t{1} << 20;
constexpr size_t kMaxErrors = 4;

std::mutex& process_mutex() {
  static std::mutex mutex;
  return mutex;
}

}  // namespace

Lock::Lock() : lock_(process_mutex()) {
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);  // errors are part of our messages, not printed
  H5PLset_loading_state(0);                     // a file must not make HDF5 load a library
}

Handle::Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, H5I_INVALID_HID)), close_(other.close_) {}

Handle& Handle::operator=(Handle&& other) noexcept {
  std::swap(id_, other.id_);
  std::swap(close_, other.close_);
  return *this;
}

Handle::~Handle() {
  if (id_ >= 0 && close_(id_) < 0) spdlog::error("HDF5 could not close an object");
}

bool Handle::close() { return close_(std::exchange(id_, H5I_INVALID_HID)) >= 0; }

std::string error_stack() {
  std::vector<std::string> lines;
  const auto collect = [](unsigned, const H5E_error2_t* error, void* out) -> herr_t {
    auto& found = *static_cast<std::vector<std::string>*>(out);
    if (error->desc && found.size() < kMaxErrors) found.emplace_back(error->desc);
    return 0;
  };
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, collect, &lines);
  H5Eclear2(H5E_DEFAULT);
  std::string text;
  for (const std::string& line : lines) text += (text.empty() ? " (HDF5: " : "; ") + line;
  return text.empty() ? "" : text + ")";
}

hid_t file_type(at::ScalarType type) {
  switch (type) {
    case at::kInt:
      return H5T_STD_I32LE;
    case at::kLong:
      return H5T_STD_I64LE;
    case at::kByte:
      return H5T_STD_U8LE;
    case at::kFloat:
      return H5T_IEEE_F32LE;
    case at::kDouble:
      return H5T_IEEE_F64LE;
    default:
      return H5I_INVALID_HID;
  }
}

std::vector<std::string> prefixes(const std::string& name) {
  std::vector<std::string> result;
  for (size_t at = name.find('/', 1); at != std::string::npos; at = name.find('/', at + 1)) {
    result.push_back(name.substr(0, at));
  }
  result.push_back(name);
  return result;
}

Handle image_access(H5FD_file_image_callbacks_t callbacks) {
  Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  if (!access.valid() || H5Pset_fapl_core(access.get(), kImageGrowth, false) < 0 ||
      H5Pset_file_image_callbacks(access.get(), &callbacks) < 0) {
    throw InternalError("HDF5 cannot work in memory" + error_stack());
  }
  return access;
}

std::string image_name(const void* unique) {
  return "corank-image-" + std::to_string(reinterpret_cast<uintptr_t>(unique));
}

void* same_buffer(void* to, const void* from, size_t size, H5FD_file_image_op_t, void*) {
  return to == from ? to : std::memcpy(to, from, size);
}
herr_t keep_buffer(void*, H5FD_file_image_op_t, void*) { return 0; }
void* same_udata(void* udata) { return udata; }
herr_t keep_udata(void*) { return 0; }

}  // namespace corank::h5
