#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <set>
#include <utility>

#include "configs/error.h"
#include "data/h5.h"
#include "data/h5_internal.h"

namespace corank::h5 {
namespace {

constexpr int kMaxGroupDepth = 32;
constexpr at::ScalarType kH5Types[] = {at::kInt, at::kLong, at::kByte, at::kFloat, at::kDouble};

// An image: its buffer is the udata.
void* image_buffer(size_t, H5FD_file_image_op_t, void* udata) { return udata; }
void* refuse_growth(void*, size_t, H5FD_file_image_op_t, void*) { return nullptr; }

struct Dataset {
  Handle id;
  std::vector<int64_t> shape;
  at::ScalarType dtype;
};

}  // namespace

struct Reader::Impl {
  std::string origin;
  std::string image;
  Handle file;
  struct stat opened {};  ///< of a file on disk

  [[noreturn]] void refuse(const std::string& what) const {
    throw InputError(origin + ": " + what + error_stack() +
                     ". The file is damaged or was not made for corank; make it again or restore it.");
  }
  Handle own(hid_t id, Handle::Close closer, const std::string& what) const {
    if (id < 0) refuse(what);
    return Handle(id, closer);
  }

  void open(hid_t access, const char* name) {
    file = own(H5Fopen(name, H5F_ACC_RDONLY, access), H5Fclose, "is not a sound HDF5 file");
  }

  struct stat status_on_disk() const {
    void* descriptor = nullptr;
    struct stat status {};
    if (H5Fget_vfd_handle(file.get(), H5P_DEFAULT, &descriptor) < 0 ||
        ::fstat(*static_cast<int*>(descriptor), &status)) {
      refuse("its size on disk cannot be read");
    }
    return status;
  }

  /// HDF5 reads zeros, which have the right checksum, where a file has become shorter after it was opened.
  void check_unchanged() const {
    if (!image.empty()) return;
    const struct stat now = status_on_disk();
    const auto time = [](const struct stat& status) {
      return std::pair(status.st_mtim.tv_sec, status.st_mtim.tv_nsec);
    };
    if (now.st_size != opened.st_size || time(now) != time(opened)) refuse("has changed while it was read");
  }

  /// `memory` and `space` as H5Dread has them.
  void read(const Dataset& dataset, const std::string& name, hid_t memory, hid_t space, at::Tensor& to) const {
    if (to.numel() == 0) return;
    if (H5Dread(dataset.id.get(), file_type(dataset.dtype), memory, space, H5P_DEFAULT, to.mutable_data_ptr()) < 0) {
      refuse(name + " cannot be read");
    }
    check_unchanged();
  }

  /// False if a part of the path is absent. Looks at the links before anything follows them.
  bool exists(const std::string& name) const {
    for (const std::string& prefix : prefixes(name)) {
      if (prefix == "/") continue;
      const htri_t found = H5Lexists(file.get(), prefix.c_str(), H5P_DEFAULT);
      if (found < 0) refuse(prefix + " cannot be looked up");
      if (found == 0) return false;
      H5L_info_t info;
      if (H5Lget_info(file.get(), prefix.c_str(), &info, H5P_DEFAULT) < 0) refuse(prefix + ": its link cannot be read");
      if (info.type != H5L_TYPE_HARD) refuse(prefix + " is a soft or external link, which is not followed");
    }
    return true;
  }

  Handle open_object(const std::string& name) const {
    if (!exists(name)) refuse("has no " + name);
    return own(H5Oopen(file.get(), name.c_str(), H5P_DEFAULT), H5Oclose, name + " cannot be opened");
  }

  hsize_t size_of_file() const {
    hsize_t bytes = 0;
    if (H5Fget_filesize(file.get(), &bytes) < 0) refuse("its size cannot be read");
    return bytes;
  }

  void check_storage(const Dataset& dataset, const std::string& name) const {
    const Handle creation = own(H5Dget_create_plist(dataset.id.get()), H5Pclose, name + ": its layout cannot be read");
    const H5D_layout_t layout = H5Pget_layout(creation.get());
    if (layout != H5D_COMPACT && layout != H5D_CONTIGUOUS && layout != H5D_CHUNKED) {
      refuse(name + " is virtual: its data would come from elsewhere");
    }
    if (layout == H5D_CONTIGUOUS && H5Pget_external_count(creation.get()) != 0) {
      refuse(name + " keeps its data in another file");
    }
    for (int i = 0; i < H5Pget_nfilters(creation.get()); ++i) {
      unsigned flags = 0, config = 0;
      size_t num_values = 0;
      const auto filter =
          H5Pget_filter2(creation.get(), static_cast<unsigned>(i), &flags, &num_values, nullptr, 0, nullptr, &config);
      if (filter != H5Z_FILTER_FLETCHER32) {
        refuse(name + " uses HDF5 filter " + std::to_string(filter) + "; only Fletcher32 (3) is read, no compression");
      }
    }
  }

  /// Declared sizes must be backed by bytes, before anything is allocated for them.
  void check_size(const Dataset& dataset, const std::string& name) const {
    int64_t bytes = static_cast<int64_t>(c10::elementSize(dataset.dtype));
    for (const int64_t size : dataset.shape) {
      if (__builtin_mul_overflow(bytes, size, &bytes)) refuse(name + " declares an impossible size");
    }
    const hsize_t file_bytes = size_of_file();
    const hsize_t stored = H5Dget_storage_size(dataset.id.get());
    if (stored < static_cast<hsize_t>(bytes) || file_bytes < static_cast<hsize_t>(bytes)) {
      refuse(name + " declares " + std::to_string(bytes) + " bytes and stores " + std::to_string(stored));
    }
  }

  at::ScalarType dtype_of(const Handle& dataset, const std::string& name) const {
    const Handle type = own(H5Dget_type(dataset.get()), H5Tclose, name + ": its type cannot be read");
    for (const at::ScalarType candidate : kH5Types) {
      if (H5Tequal(type.get(), file_type(candidate)) > 0) return candidate;
    }
    refuse(name + " is not of type int32, int64, uint8, float32 or float64, little-endian");
  }

  std::vector<int64_t> shape_of(const Handle& dataset, const std::string& name) const {
    const Handle space = own(H5Dget_space(dataset.get()), H5Sclose, name + ": its shape cannot be read");
    const H5S_class_t kind = H5Sget_simple_extent_type(space.get());
    const int rank = H5Sget_simple_extent_ndims(space.get());
    if ((kind != H5S_SCALAR && kind != H5S_SIMPLE) || rank < 0) refuse(name + " has no shape");
    std::vector<hsize_t> dims(static_cast<size_t>(rank));
    if (rank > 0 && H5Sget_simple_extent_dims(space.get(), dims.data(), nullptr) < 0) {
      refuse(name + ": its shape cannot be read");
    }
    for (const hsize_t size : dims) {
      if (size > static_cast<hsize_t>(INT64_MAX)) refuse(name + " declares an impossible size");
    }
    return {dims.begin(), dims.end()};
  }

  Dataset open_dataset(const std::string& name) const {
    Dataset dataset{open_object(name), {}, at::kFloat};
    if (H5Iget_type(dataset.id.get()) != H5I_DATASET) refuse(name + " is not a dataset");
    dataset.shape = shape_of(dataset.id, name);
    dataset.dtype = dtype_of(dataset.id, name);
    check_storage(dataset, name);
    check_size(dataset, name);
    return dataset;
  }

  /// Hard links may lead to an object on many ways, or in a circle: each is to be met once.
  void require_new(const Handle& object, const std::string& name, std::set<haddr_t>& met) const {
    H5O_info_t info;
    if (H5Oget_info2(object.get(), &info, H5O_INFO_BASIC) < 0) refuse(name + " cannot be looked up");
    if (!met.insert(info.addr).second) refuse(name + " stands in the file under another name too");
  }

  void collect(const std::string& group, int depth, std::set<haddr_t>& met, std::vector<std::string>& found) const {
    if (depth > kMaxGroupDepth) refuse(group + " is nested too deeply");
    const Handle object = open_object(group);
    if (H5Iget_type(object.get()) != H5I_GROUP) refuse(group + " is not a group");
    std::vector<std::string> members;
    const auto visit = [](hid_t, const char* name, const H5L_info_t*, void* out) -> herr_t {
      try {
        static_cast<std::vector<std::string>*>(out)->emplace_back(name);
        return 0;
      } catch (const std::exception&) {
        return -1;
      }
    };
    // In name order HDF5 1.10 would first build a table, and crash on clearing it where the file is damaged.
    if (H5Literate(object.get(), H5_INDEX_NAME, H5_ITER_NATIVE, nullptr, visit, &members) < 0) {
      refuse(group + " cannot be listed");
    }
    for (const std::string& member : members) {
      const std::string name = group == "/" ? member : group + "/" + member;
      const Handle one = open_object(name);
      require_new(one, name, met);
      const H5I_type_t kind = H5Iget_type(one.get());
      if (kind == H5I_GROUP) {
        collect(name, depth + 1, met, found);
      } else if (kind == H5I_DATASET) {
        found.push_back(name);
      } else {
        refuse(name + " is neither a group nor a dataset");
      }
    }
  }

  /// An attribute of the root group with one element, and its type.
  std::pair<Handle, Handle> open_attribute(const std::string& name) const {
    const std::string what = "the attribute " + name;
    if (H5Aexists(file.get(), name.c_str()) <= 0) refuse("has no attribute " + name);
    Handle attribute = own(H5Aopen(file.get(), name.c_str(), H5P_DEFAULT), H5Aclose, what + " cannot be opened");
    Handle type = own(H5Aget_type(attribute.get()), H5Tclose, what + ": its type cannot be read");
    const Handle space = own(H5Aget_space(attribute.get()), H5Sclose, what + ": its shape cannot be read");
    if (H5Sget_simple_extent_npoints(space.get()) != 1) refuse(what + " is not a single value");
    return {std::move(attribute), std::move(type)};
  }

  void check_length(size_t bytes, const std::string& name) const {
    if (bytes > size_of_file()) refuse("the attribute " + name + " declares more bytes than the file has");
  }

  /// h5py's plain str attributes are of variable length.
  std::string read_variable_string(const Handle& attribute, const Handle& type, const std::string& name) const {
    char* text = nullptr;
    if (H5Aread(attribute.get(), type.get(), &text) < 0) refuse("the attribute " + name + " cannot be read");
    const std::string value = text ? text : "";
    H5free_memory(text);
    return value;
  }

  std::string read_fixed_string(const Handle& attribute, const Handle& type, const std::string& name) const {
    const size_t size = H5Tget_size(type.get());
    check_length(size, name);
    std::string value(size, '\0');
    if (H5Aread(attribute.get(), type.get(), value.data()) < 0) refuse("the attribute " + name + " cannot be read");
    return value.substr(0, value.find('\0'));
  }
};

Reader::Reader(const std::string& path) {
  if (::access(path.c_str(), R_OK) != 0) {
    throw MissingError(path + ": does not exist or cannot be read. Check the path and its permissions.");
  }
  if (!std::filesystem::is_regular_file(path)) {
    throw MissingError(path + ": is no regular file, and an HDF5 file is needed here. Name a file.");
  }
  const Lock lock;
  auto impl = std::make_unique<Impl>();
  impl->origin = path;
  const Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  // Inputs do not change while they are read, and some network file systems know no locks.
  if (!access.valid() || H5Pset_file_locking(access.get(), false, true) < 0) impl->refuse("cannot be opened");
  impl->open(access.get(), path.c_str());
  impl->opened = impl->status_on_disk();
  impl_ = std::move(impl);
}

Reader::Reader(std::string image, std::string origin) {
  const Lock lock;
  auto impl = std::make_unique<Impl>();
  impl->origin = std::move(origin);
  impl->image = std::move(image);
  if (impl->image.empty()) impl->refuse("is empty");
  char* data = impl->image.data();
  const Handle access =
      image_access({image_buffer, same_buffer, refuse_growth, keep_buffer, same_udata, keep_udata, data});
  if (H5Pset_file_image(access.get(), data, impl->image.size()) < 0) impl->refuse("cannot be opened in memory");
  impl->open(access.get(), image_name(data).c_str());
  impl_ = std::move(impl);
}

Reader::Reader(Reader&& other) noexcept = default;

Reader::~Reader() {
  if (!impl_) return;
  const Lock lock;
  impl_.reset();
}

const std::string& Reader::origin() const { return impl_->origin; }

bool Reader::has(const std::string& name) const {
  const Lock lock;
  return impl_->exists(name);
}

std::vector<std::string> Reader::names(const std::string& group) const {
  const Lock lock;
  std::vector<std::string> found;
  std::set<haddr_t> met;
  impl_->collect(group, 0, met, found);
  std::sort(found.begin(), found.end());
  return found;
}

std::vector<int64_t> Reader::shape(const std::string& name) const {
  const Lock lock;
  return impl_->open_dataset(name).shape;
}

at::ScalarType Reader::dtype(const std::string& name) const {
  const Lock lock;
  return impl_->open_dataset(name).dtype;
}

at::Tensor Reader::read(const std::string& name) const {
  const Lock lock;
  const Dataset dataset = impl_->open_dataset(name);
  at::Tensor tensor = at::empty(dataset.shape, dataset.dtype);
  impl_->read(dataset, name, H5S_ALL, H5S_ALL, tensor);
  return tensor;
}

at::Tensor Reader::read_range(const std::string& name, int64_t begin, int64_t end) const {
  const Lock lock;
  const Dataset dataset = impl_->open_dataset(name);
  if (dataset.shape.size() != 1 || begin < 0 || end < begin || end > dataset.shape[0]) {
    throw InternalError(impl_->origin + ": " + name + ": no range [" + std::to_string(begin) + ", " +
                        std::to_string(end) + ")");
  }
  at::Tensor tensor = at::empty({end - begin}, dataset.dtype);
  if (tensor.numel() == 0) return tensor;
  const hsize_t start = static_cast<hsize_t>(begin), count = static_cast<hsize_t>(end - begin);
  const Handle space = impl_->own(H5Dget_space(dataset.id.get()), H5Sclose, name + ": its shape cannot be read");
  const Handle memory = impl_->own(H5Screate_simple(1, &count, nullptr), H5Sclose, name + ": no room to read it");
  if (H5Sselect_hyperslab(space.get(), H5S_SELECT_SET, &start, nullptr, &count, nullptr) < 0) {
    impl_->refuse(name + " has no such range");
  }
  impl_->read(dataset, name, memory.get(), space.get(), tensor);
  return tensor;
}

bool Reader::has_attribute(const std::string& name) const {
  const Lock lock;
  const htri_t found = H5Aexists(impl_->file.get(), name.c_str());
  if (found < 0) impl_->refuse("its attributes cannot be read");
  return found > 0;
}

std::string Reader::attribute_string(const std::string& name) const {
  const Lock lock;
  const auto [attribute, type] = impl_->open_attribute(name);
  if (H5Tget_class(type.get()) != H5T_STRING) impl_->refuse("the attribute " + name + " is not a string");
  return H5Tis_variable_str(type.get()) > 0 ? impl_->read_variable_string(attribute, type, name)
                                            : impl_->read_fixed_string(attribute, type, name);
}

int64_t Reader::attribute_int(const std::string& name) const {
  const Lock lock;
  const auto [attribute, type] = impl_->open_attribute(name);
  if (H5Tget_class(type.get()) != H5T_INTEGER) impl_->refuse("the attribute " + name + " is not an integer");
  const bool is_uint64 = H5Tget_size(type.get()) >= sizeof(int64_t) && H5Tget_sign(type.get()) == H5T_SGN_NONE;
  if (is_uint64) impl_->refuse("the attribute " + name + " is a 64-bit unsigned integer; signed ones are read");
  int64_t value = 0;
  if (H5Aread(attribute.get(), H5T_NATIVE_INT64, &value) < 0)
    impl_->refuse("the attribute " + name + " cannot be read");
  return value;
}

}  // namespace corank::h5
