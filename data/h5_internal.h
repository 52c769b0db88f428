#pragma once
#include <ATen/ATen.h>

#define H5_USE_110_API  // the same names and types in later versions of HDF5
#include <hdf5.h>

#include <mutex>
#include <string>
#include <vector>

/// What h5_reader.cpp and h5_writer.cpp share; for no one else.
namespace corank::h5 {

/// Held by every public function. HDF5's state is the process's, so its lock is too.
class Lock {
 public:
  Lock();

 private:
  std::lock_guard<std::mutex> lock_;
};

/// Move-only owner of one HDF5 identifier; may hold none. The destructor only logs a failure to close.
class Handle {
 public:
  using Close = herr_t (*)(hid_t);
  Handle() = default;
  Handle(hid_t id, Close closer) : id_(id), close_(closer) {}
  Handle(Handle&& other) noexcept;
  Handle& operator=(Handle&& other) noexcept;
  ~Handle();
  hid_t get() const { return id_; }
  bool valid() const { return id_ >= 0; }
  /// Closes now. False on failure.
  bool close();

 private:
  hid_t id_ = H5I_INVALID_HID;
  Close close_ = nullptr;
};

/// What HDF5 says of its last failure, innermost cause first.
std::string error_stack();

/// HDF5's type for the file and, on a little-endian machine, for memory. Negative for a type that is not stored.
hid_t file_type(at::ScalarType type);

/// "a/b/c" -> "a", "a/b", "a/b/c".
std::vector<std::string> prefixes(const std::string& name);

/// File access over the bytes of an image, without copying them: the callbacks hand HDF5 the caller's buffer.
Handle image_access(H5FD_file_image_callbacks_t callbacks);

/// HDF5 takes files in memory that have the same name for the same file, so each image needs its own.
std::string image_name(const void* unique);

// Callbacks for buffers that HDF5 neither copies nor frees.
void* same_buffer(void* to, const void* from, size_t size, H5FD_file_image_op_t, void*);
herr_t keep_buffer(void*, H5FD_file_image_op_t, void*);
void* same_udata(void* udata);
herr_t keep_udata(void*);

}  // namespace corank::h5
