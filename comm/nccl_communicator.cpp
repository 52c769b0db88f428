#include "comm/nccl_communicator.h"

#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>
#include <cuda_runtime.h>
#include <nccl.h>

#include <algorithm>
#include <array>
#include <exception>

#include "comm/device_place.h"
#include "comm/mpi_comm.h"
#include "configs/error.h"

namespace corank {
namespace {

[[noreturn]] void fail(const MpiComm& group, const char* operation, const std::string& reason) {
  throw CommError(std::string(operation) + " over " + group.axis() + " failed on rank " + std::to_string(group.rank()) +
                  " of " + std::to_string(group.size()) + ": " + reason +
                  ". A peer, a GPU or the network failed; start the same command again.");
}

void check_nccl(const MpiComm& group, ncclComm_t comm, ncclResult_t code, const char* operation) {
  if (code == ncclSuccess) return;
  fail(group, operation, std::string(ncclGetErrorString(code)) + " (" + ncclGetLastError(comm) + ")");
}

void check_cuda(const MpiComm& group, cudaError_t code, const char* operation) {
  if (code != cudaSuccess) fail(group, operation, cudaGetErrorString(code));
}

struct EndNccl {
  at::DeviceIndex device;

  /// An orderly end waits for the peers. After an error they may never come, so then the communicator is aborted.
  void operator()(ncclComm_t comm) const noexcept {
    ncclResult_t state = ncclSuccess;
    const bool healthy = ncclCommGetAsyncError(comm, &state) == ncclSuccess && state == ncclSuccess;
    if (!healthy || std::uncaught_exceptions() > 0) return warn(ncclCommAbort(comm), "ncclCommAbort");
    const c10::cuda::CUDAGuard guard(device);
    const cudaError_t drained = cudaDeviceSynchronize();
    if (drained != cudaSuccess) {
      TORCH_WARN("Before ncclCommDestroy: ", cudaGetErrorString(drained));
      return warn(ncclCommAbort(comm), "ncclCommAbort");
    }
    warn(ncclCommFinalize(comm), "ncclCommFinalize");
    warn(ncclCommDestroy(comm), "ncclCommDestroy");
  }

  static void warn(ncclResult_t code, const char* operation) noexcept {
    if (code != ncclSuccess) TORCH_WARN(operation, ": ", ncclGetErrorString(code));
  }
};
using NcclComm = std::unique_ptr<ncclComm, EndNccl>;

/// Collective over `group`. Null in a group of one, which never reaches NCCL.
NcclComm connect(const MpiComm& group, at::DeviceIndex device) {
  NcclComm result(nullptr, EndNccl{device});
  if (group.size() == 1) return result;
  ncclUniqueId id{};
  if (group.rank() == 0) check_nccl(group, nullptr, ncclGetUniqueId(&id), "ncclGetUniqueId");
  group.broadcast(id, 0);
  const c10::cuda::CUDAGuard guard(device);
  ncclComm_t comm = nullptr;
  check_nccl(group, nullptr, ncclCommInitRank(&comm, group.size(), id, group.rank()), "ncclCommInitRank");
  result.reset(comm);
  return result;
}

ncclDataType_t nccl_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return ncclFloat32;
    case at::kDouble:
      return ncclFloat64;
    case at::kBFloat16:
      return ncclBfloat16;
    case at::kInt:
      return ncclInt32;
    case at::kLong:
      return ncclInt64;
    case at::kByte:
      return ncclUint8;
    default:
      throw InternalError(std::string("No NCCL type for ") + at::toString(type) + ".");
  }
}

ncclRedOp_t nccl_op(ReduceOp op) {
  switch (op) {
    case ReduceOp::sum:
      return ncclSum;
    case ReduceOp::max:
      return ncclMax;
    case ReduceOp::min:
      return ncclMin;
  }
  throw InternalError("Unknown reduction.");
}

class NcclCommunicator final : public Communicator {
 public:
  NcclCommunicator(MpiComm group, int host, at::Device cuda_device, Ledger& ledger)
      : Communicator(group.ring(host), group.axis(), cuda_device, ledger),
        group_(std::move(group)),
        host_(host),
        comm_(connect(group_, cuda_device.index())) {}

 protected:
  void do_all_reduce(const at::Tensor& tensor, ReduceOp op) override;
  void do_all_gather(const at::Tensor& output, const at::Tensor& input) override;
  void do_reduce_scatter(const at::Tensor& output, const at::Tensor& input, ReduceOp op) override;
  void do_broadcast(const at::Tensor& tensor, int root) override;
  void do_barrier() override { group_.barrier(); }
  std::pair<int64_t, int64_t> do_min_max(int64_t value) override { return group_.min_max(value); }
  void do_synchronize() override { check_cuda(group_, cudaStreamSynchronize(stream()), "cudaStreamSynchronize"); }
  std::unique_ptr<Communicator> do_split(int color, const std::string& axis) override {
    return std::make_unique<NcclCommunicator>(group_.split(color, axis), host_, device(), ledger());
  }

 private:
  /// The caller's stream, after a look whether an earlier collective has failed meanwhile.
  cudaStream_t healthy_stream();
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream(device().index()); }
  void check(ncclResult_t code, const char* operation) { check_nccl(group_, comm_.get(), code, operation); }

  MpiComm group_;
  int host_;
  NcclComm comm_;  // after group_: it ends first
};

cudaStream_t NcclCommunicator::healthy_stream() {
  ncclResult_t state = ncclSuccess;
  check(ncclCommGetAsyncError(comm_.get(), &state), "ncclCommGetAsyncError");
  check(state, "An earlier collective");
  return stream();
}

void NcclCommunicator::do_all_reduce(const at::Tensor& tensor, ReduceOp op) {
  void* data = tensor.data_ptr();
  check(ncclAllReduce(data, data, tensor.numel(), nccl_type(tensor.scalar_type()), nccl_op(op), comm_.get(),
                      healthy_stream()),
        "ncclAllReduce");
}

void NcclCommunicator::do_all_gather(const at::Tensor& output, const at::Tensor& input) {
  check(ncclAllGather(input.data_ptr(), output.data_ptr(), input.numel(), nccl_type(input.scalar_type()), comm_.get(),
                      healthy_stream()),
        "ncclAllGather");
}

void NcclCommunicator::do_reduce_scatter(const at::Tensor& output, const at::Tensor& input, ReduceOp op) {
  check(ncclReduceScatter(input.data_ptr(), output.data_ptr(), output.numel(), nccl_type(input.scalar_type()),
                          nccl_op(op), comm_.get(), healthy_stream()),
        "ncclReduceScatter");
}

void NcclCommunicator::do_broadcast(const at::Tensor& tensor, int root) {
  void* data = tensor.data_ptr();
  check(ncclBroadcast(data, data, tensor.numel(), nccl_type(tensor.scalar_type()), root, comm_.get(), healthy_stream()),
        "ncclBroadcast");
}

std::string device_uuid(const MpiComm& group, int device) {
  cudaDeviceProp properties{};
  check_cuda(group, cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  std::string uuid = "GPU-";
  for (const char byte : properties.uuid.bytes) {
    constexpr const char* kDigits = "0123456789abcdef";
    uuid += kDigits[(byte >> 4) & 0xf];
    uuid += kDigits[byte & 0xf];
  }
  return uuid;
}

/// Collective over `group`. What every rank sees, by rank.
std::vector<VisibleDevices> gather_visible(const MpiComm& group) {
  constexpr int kMost = 64;
  struct Record {
    std::array<char, 256> host;
    int count;
    std::array<std::array<char, 64>, kMost> uuids;
  };
  Record mine{};
  host_name().copy(mine.host.data(), mine.host.size() - 1);
  mine.count = std::min<int>(c10::cuda::device_count(), kMost);
  for (int i = 0; i < mine.count; ++i) {
    device_uuid(group, i).copy(mine.uuids[i].data(), mine.uuids[i].size() - 1);
  }
  std::vector<VisibleDevices> ranks;
  for (const Record& record : group.all_gather(mine)) {
    ranks.push_back({record.host.data(), {}});
    for (int i = 0; i < record.count; ++i) ranks.back().uuids.emplace_back(record.uuids[i].data());
  }
  return ranks;
}

}  // namespace

std::unique_ptr<Communicator> make_nccl_communicator(const World& world, Ledger& ledger) {
  MpiComm group = MpiComm::duplicate(world.comm(), "world");
  const auto index = static_cast<at::DeviceIndex>(place_on_devices(gather_visible(group))[world.rank()]);
  c10::cuda::set_device(index);
  return std::make_unique<NcclCommunicator>(std::move(group), world.host(), at::Device(at::kCUDA, index), ledger);
}

std::string nccl_version() {
  int version = 0;
  if (ncclGetVersion(&version) != ncclSuccess) return "unknown";
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

}  // namespace corank
