#include "comm/mpi_communicator.h"

#include <algorithm>

#include "comm/mpi_comm.h"
#include "configs/error.h"

namespace corank {
namespace {

constexpr int kTag = 0;
constexpr int64_t kBroadcastPiece = int64_t{1} << 20;  // passed on while the next one comes
constexpr int64_t kSegmentPart = int64_t{1} << 17;  // elements of a rank's part that are summed at a time, in the cache

/// Parts of a tensor by place in the ring.
using RingParts = std::vector<at::Tensor>;

/// bfloat16: pairwise in float32, rounded.
void combine(const at::Tensor& mine, const at::Tensor& other, ReduceOp op) {
  at::Tensor result = mine;
  switch (op) {
    case ReduceOp::sum:
      result.add_(other);
      return;
    case ReduceOp::max:
      at::maximum_out(result, mine, other);
      return;
    case ReduceOp::min:
      at::minimum_out(result, mine, other);
      return;
  }
  throw InternalError("Unknown reduction.");
}

/// Calls work(address, bytes) for pieces of at most `most` bytes of a contiguous tensor.
template <class Work>
void for_each_piece(const at::Tensor& tensor, int64_t most, Work work) {
  auto* data = static_cast<char*>(tensor.data_ptr());
  const auto bytes = static_cast<int64_t>(tensor.nbytes());
  for (int64_t offset = 0; offset < bytes; offset += most) {
    work(data + offset, static_cast<int>(std::min(most, bytes - offset)));
  }
}

class MpiCommunicator final : public Communicator {
 public:
  MpiCommunicator(MpiComm comm, int host, int64_t max_message_bytes, Ledger& ledger)
      : Communicator(comm.ring(host), comm.axis(), at::kCPU, ledger),
        comm_(std::move(comm)),
        host_(host),
        max_message_bytes_(max_message_bytes) {}

 protected:
  void do_all_reduce(const at::Tensor& tensor, ReduceOp op) override;
  void do_all_gather(const at::Tensor& output, const at::Tensor& input) override;
  void do_reduce_scatter(const at::Tensor& output, const at::Tensor& input, ReduceOp op) override;
  void do_broadcast(const at::Tensor& tensor, int root) override;
  void do_barrier() override { comm_.barrier(); }
  std::pair<int64_t, int64_t> do_min_max(int64_t value) override { return comm_.min_max(value); }
  std::unique_ptr<Communicator> do_split(int color, const std::string& axis) override {
    return std::make_unique<MpiCommunicator>(comm_.split(color, axis), host_, max_message_bytes_, ledger());
  }

 private:
  /// The blocks of ranks, equally long.
  RingParts blocks(const at::Tensor& tensor) const;
  /// The part `back` places before this rank's.
  const at::Tensor& before(const RingParts& parts, int back) const {
    return parts[static_cast<size_t>((ring().position() + 2 * size() - back) % size())];
  }
  /// Reduces over the ranks: the part at this rank's place is whole afterwards, the others hold what was sent.
  void reduce(const RingParts& parts, ReduceOp op);
  /// An all_reduce of a flat tensor, in place.
  void reduce_segment(const at::Tensor& segment, ReduceOp op);
  /// Every rank has the part at its place and receives the others.
  void collect(const RingParts& parts);
  /// Sends `out` to the next rank while `in` comes from the previous one.
  void exchange(const at::Tensor& out, const at::Tensor& in);

  MpiComm comm_;
  int host_;
  int64_t max_message_bytes_;
};

RingParts MpiCommunicator::blocks(const at::Tensor& tensor) const {
  const at::Tensor rows = tensor.view({size(), -1});
  RingParts parts;
  for (int place = 0; place < size(); ++place) parts.push_back(rows[ring().rank_at(place)]);
  return parts;
}

void MpiCommunicator::exchange(const at::Tensor& out, const at::Tensor& in) {
  std::vector<MPI_Request> requests;
  for_each_piece(in, max_message_bytes_, [&](void* data, int bytes) {
    comm_.check(MPI_Irecv(data, bytes, MPI_BYTE, ring().previous(), kTag, comm_.get(), &requests.emplace_back()),
                "MPI_Irecv");
  });
  for_each_piece(out, max_message_bytes_, [&](void* data, int bytes) {
    comm_.check(MPI_Isend(data, bytes, MPI_BYTE, ring().next(), kTag, comm_.get(), &requests.emplace_back()),
                "MPI_Isend");
  });
  for (MPI_Request& request : requests) comm_.check(MPI_Wait(&request, MPI_STATUS_IGNORE), "MPI_Wait");
}

void MpiCommunicator::reduce(const RingParts& parts, ReduceOp op) {
  const at::Tensor room = at::empty_like(parts[0]);  // no part is longer than the first
  for (int step = 1; step < size(); ++step) {
    const at::Tensor& mine = before(parts, step + 1);
    const at::Tensor received = room.narrow(0, 0, mine.numel());
    exchange(before(parts, step), received);
    combine(mine, received, op);
  }
}

void MpiCommunicator::collect(const RingParts& parts) {
  for (int step = 0; step + 1 < size(); ++step) exchange(before(parts, step), before(parts, step + 1));
}

void MpiCommunicator::reduce_segment(const at::Tensor& segment, ReduceOp op) {
  std::vector<int64_t> lengths;
  for (int place = 0; place < size(); ++place) lengths.push_back(ring_part(segment.numel(), place, size()));
  const RingParts parts = segment.split_with_sizes(lengths);
  reduce(parts, op);
  collect(parts);
}

// A segment is a multiple of the ranks, so that its parts add up to those of the whole.
void MpiCommunicator::do_all_reduce(const at::Tensor& tensor, ReduceOp op) {
  const at::Tensor flat = tensor.view({-1});
  const int64_t most = size() * kSegmentPart;
  for (int64_t begin = 0; begin < flat.numel(); begin += most) {
    reduce_segment(flat.narrow(0, begin, std::min(most, flat.numel() - begin)), op);
  }
}

void MpiCommunicator::do_all_gather(const at::Tensor& output, const at::Tensor& input) {
  const RingParts parts = blocks(output);
  before(parts, 0).copy_(input.view({-1}));
  collect(parts);
}

void MpiCommunicator::do_reduce_scatter(const at::Tensor& output, const at::Tensor& input, ReduceOp op) {
  const RingParts parts = blocks(input.clone());
  reduce(parts, op);
  output.view({-1}).copy_(before(parts, 0));
}

void MpiCommunicator::do_broadcast(const at::Tensor& tensor, int root) {
  const bool receives = rank() != root, sends = ring().next() != root;
  for_each_piece(tensor, std::min(kBroadcastPiece, max_message_bytes_), [&](void* data, int bytes) {
    if (receives) {
      comm_.check(MPI_Recv(data, bytes, MPI_BYTE, ring().previous(), kTag, comm_.get(), MPI_STATUS_IGNORE), "MPI_Recv");
    }
    if (sends) comm_.check(MPI_Send(data, bytes, MPI_BYTE, ring().next(), kTag, comm_.get()), "MPI_Send");
  });
}

}  // namespace

std::unique_ptr<Communicator> make_mpi_communicator(const World& world, Ledger& ledger, const MpiOptions& options) {
  return std::make_unique<MpiCommunicator>(MpiComm::duplicate(world.comm(), "world"),
                                           options.host.value_or(world.host()), options.max_message_bytes, ledger);
}

}  // namespace corank
