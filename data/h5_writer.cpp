
#include <algorithm>
#include <cstring>
#include <utility>

#include "configs/error.h"
#include "data/h5.h"
#include "data/h5_internal.h"

namespace corank::h5 {
namespace {

/// Small enough for reads of short ranges, which take whole chunks.
constexpr hsize_t kChunkBytes = hsize_t{1} << 20;

// An image: the udata is the string that becomes the file.
void* resize_image(void* udata, size_t size) {
  auto& bytes = *static_cast<std::string*>(udata);
  try {
    bytes.resize(size);  // zeros: what HDF5 leaves untouched must not differ from run to run
  } catch (const std::exception&) {
    return nullptr;  // no exception may cross HDF5
  }
  return bytes.data();
}
void* image_malloc(size_t size, H5FD_file_image_op_t, void* udata) { return resize_image(udata, size); }
void* image_realloc(void*, size_t size, H5FD_file_image_op_t, void* udata) { return resize_image(udata, size); }

/// Equal chunks of at most kChunkBytes, cut along the first dimensions: what the last one sticks out is stored too.
std::vector<hsize_t> chunk_shape(const at::Tensor& tensor) {
  std::vector<hsize_t> chunk(tensor.sizes().begin(), tensor.sizes().end());
  hsize_t bytes = tensor.nbytes();
  for (hsize_t& size : chunk) {
    if (bytes <= kChunkBytes) break;
    const hsize_t rest = bytes / size;
    const hsize_t most = std::max<hsize_t>(1, kChunkBytes / rest);
    const hsize_t num_chunks = (size + most - 1) / most;
    size = (size + num_chunks - 1) / num_chunks;
    bytes = size * rest;
  }
  return chunk;
}

/// Where the file ends, from its superblock (HDF5 file format 3.0, II.A, versions 2 and 3: offset 28): the image itself
/// is rounded up to whole growth steps.
uint64_t end_of_file(const std::string& image) {
  constexpr size_t kVersionAt = 8, kOffsetSizeAt = 9, kEndAt = 28;
  uint64_t end = 0;
  const bool known = image.size() >= kEndAt + sizeof(end) && image.compare(1, 3, "HDF") == 0 &&
                     (image[kVersionAt] == 2 || image[kVersionAt] == 3) && image[kOffsetSizeAt] == sizeof(end);
  if (known) std::memcpy(&end, image.data() + kEndAt, sizeof(end));
  if (end == 0 || end > image.size()) throw InternalError("the HDF5 image has no sound superblock.");
  return end;
}

}  // namespace

struct Writer::Impl {
  std::string bytes;
  Handle file;

  static void check(bool good, const std::string& what) {
    if (!good) throw InternalError("building an HDF5 file: " + what + error_stack());
  }
  static Handle own(hid_t id, Handle::Close closer, const std::string& what) {
    check(id >= 0, what);
    return Handle(id, closer);
  }
  /// A creation list whose objects carry no time.
  static Handle timeless(hid_t kind) {
    Handle list = own(H5Pcreate(kind), H5Pclose, "no property list");
    check(H5Pset_obj_track_times(list.get(), false) >= 0, "times cannot be left out");
    return list;
  }

  void make_groups(const std::string& name) {
    std::vector<std::string> groups = prefixes(name);
    groups.pop_back();
    for (const std::string& group : groups) {
      const htri_t found = H5Lexists(file.get(), group.c_str(), H5P_DEFAULT);
      check(found >= 0, group + " cannot be looked up");
      if (found > 0) continue;
      const Handle creation = timeless(H5P_GROUP_CREATE);
      own(H5Gcreate2(file.get(), group.c_str(), H5P_DEFAULT, creation.get(), H5P_DEFAULT), H5Gclose,
          group + " cannot be made");
    }
  }

  void write_attribute(const std::string& name, hid_t type, const void* value) {
    const Handle space = own(H5Screate(H5S_SCALAR), H5Sclose, name);
    const Handle attribute = own(H5Acreate2(file.get(), name.c_str(), type, space.get(), H5P_DEFAULT, H5P_DEFAULT),
                                 H5Aclose, "the attribute " + name + " cannot be made");
    check(H5Awrite(attribute.get(), type, value) >= 0, "the attribute " + name + " cannot be written");
  }
};

Writer::Writer() {
  const Lock lock;
  auto impl = std::make_unique<Impl>();
  const Handle access =
      image_access({image_malloc, same_buffer, image_realloc, keep_buffer, same_udata, keep_udata, &impl->bytes});
  // Only the 1.10 format has checksums on everything but the data.
  Impl::check(H5Pset_libver_bounds(access.get(), H5F_LIBVER_V110, H5F_LIBVER_V110) >= 0, "no 1.10 format");
  const Handle creation = Impl::timeless(H5P_FILE_CREATE);
  impl->file = Impl::own(H5Fcreate(image_name(impl.get()).c_str(), H5F_ACC_TRUNC, creation.get(), access.get()),
                         H5Fclose, "the file cannot be made");
  impl_ = std::move(impl);
}

Writer::~Writer() {
  if (!impl_) return;
  const Lock lock;
  impl_.reset();
}

void Writer::write(const std::string& name, const at::Tensor& tensor) {
  const Lock lock;
  const hid_t type = file_type(tensor.scalar_type());
  Impl::check(
      type >= 0 && tensor.is_cpu() && tensor.is_contiguous(),
      name + ": only contiguous CPU tensors of int32, int64, uint8, float32 or float64, not " + tensor.toString());
  impl_->make_groups(name);
  const std::vector<hsize_t> dims(tensor.sizes().begin(), tensor.sizes().end());
  const Handle space = Impl::own(
      dims.empty() ? H5Screate(H5S_SCALAR) : H5Screate_simple(static_cast<int>(dims.size()), dims.data(), nullptr),
      H5Sclose, name + ": no such shape");
  const Handle creation = Impl::timeless(H5P_DATASET_CREATE);
  if (dims.empty() || tensor.numel() == 0) {
    Impl::check(H5Pset_layout(creation.get(), H5D_COMPACT) >= 0, name + ": no compact layout");
  } else {
    const std::vector<hsize_t> chunk = chunk_shape(tensor);
    Impl::check(H5Pset_chunk(creation.get(), static_cast<int>(chunk.size()), chunk.data()) >= 0 &&
                    H5Pset_fletcher32(creation.get()) >= 0,
                name + ": no checksummed layout");
  }
  const Handle dataset = Impl::own(
      H5Dcreate2(impl_->file.get(), name.c_str(), type, space.get(), H5P_DEFAULT, creation.get(), H5P_DEFAULT),
      H5Dclose, name + " cannot be made");
  if (tensor.numel() == 0) return;
  Impl::check(H5Dwrite(dataset.get(), type, H5S_ALL, H5S_ALL, H5P_DEFAULT, tensor.const_data_ptr()) >= 0,
              name + " cannot be written");
}

void Writer::attribute(const std::string& name, const std::string& value) {
  const Lock lock;
  Impl::check(value.find('\0') == std::string::npos, "the attribute " + name + " holds a NUL");
  const Handle type = Impl::own(H5Tcopy(H5T_C_S1), H5Tclose, "no string type");
  Impl::check(H5Tset_size(type.get(), std::max<size_t>(1, value.size())) >= 0 &&
                  H5Tset_strpad(type.get(), H5T_STR_NULLPAD) >= 0 && H5Tset_cset(type.get(), H5T_CSET_UTF8) >= 0,
              "no string of " + std::to_string(value.size()) + " bytes");
  impl_->write_attribute(name, type.get(), value.c_str());
}

void Writer::attribute(const std::string& name, int64_t value) {
  const Lock lock;
  impl_->write_attribute(name, H5T_STD_I64LE, &value);
}

std::string Writer::finish() {
  const Lock lock;
  Impl::check(impl_->file.close(), "the file cannot be closed");
  std::string bytes = std::move(impl_->bytes);
  impl_.reset();
  bytes.resize(end_of_file(bytes));
  return bytes;
}

}  // namespace corank::h5
