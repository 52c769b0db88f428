#include "comm/mpi_communicator.h"

#include <algorithm>

#include "comm/mpi_comm.h"
#include "configs/error.h"

namespace corank {
namespace {

struct Sum {
  float operator()(float a, float b) const { return a + b; }
};
struct Max {
  float operator()(float a, float b) const { return std::max(a, b); }
};
struct Min {
  float operator()(float a, float b) const { return std::min(a, b); }
};

template <class Combine>
void combine_bfloat16(void* in, void* inout, int* count, MPI_Datatype*) {
  const auto* a = static_cast<const at::BFloat16*>(in);
  auto* b = static_cast<at::BFloat16*>(inout);
  for (int i = 0; i < *count; ++i) b[i] = at::BFloat16(Combine()(a[i], b[i]));  // rounds to nearest even
}

/// Owns a commutative reduction of our own.
class MpiOp {
 public:
  MpiOp(const MpiComm& comm, MPI_User_function* function) {
    comm.check(MPI_Op_create(function, 1, &op_), "MPI_Op_create");
  }
  MpiOp(const MpiOp&) = delete;
  MpiOp& operator=(const MpiOp&) = delete;
  ~MpiOp() {
    int finalized = 0;
    MPI_Finalized(&finalized);
    if (!finalized) MPI_Op_free(&op_);
  }
  MPI_Op get() const { return op_; }

 private:
  MPI_Op op_ = MPI_OP_NULL;
};

MPI_Datatype mpi_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return MPI_FLOAT;
    case at::kDouble:
      return MPI_DOUBLE;
    case at::kBFloat16:
      return MPI_UINT16_T;
    case at::kInt:
      return MPI_INT32_T;
    case at::kLong:
      return MPI_INT64_T;
    case at::kByte:
      return MPI_UINT8_T;
    default:
      throw InternalError(std::string("No MPI type for ") + at::toString(type) + ".");
  }
}

MPI_Op built_in_op(ReduceOp op) {
  switch (op) {
    case ReduceOp::sum:
      return MPI_SUM;
    case ReduceOp::max:
      return MPI_MAX;
    case ReduceOp::min:
      return MPI_MIN;
  }
  throw InternalError("Unknown reduction.");
}

void* address(const at::Tensor& tensor, int64_t offset) {
  return static_cast<char*>(tensor.data_ptr()) + offset * tensor.element_size();
}

class MpiCommunicator final : public Communicator {
 public:
  MpiCommunicator(MpiComm comm, Ledger& ledger, int64_t max_elements)
      : Communicator(comm.rank(), comm.size(), comm.axis(), at::kCPU, ledger),
        comm_(std::move(comm)),
        max_elements_(max_elements),
        bfloat16_sum_(comm_, combine_bfloat16<Sum>),
        bfloat16_max_(comm_, combine_bfloat16<Max>),
        bfloat16_min_(comm_, combine_bfloat16<Min>) {}

 protected:
  void do_all_reduce(const at::Tensor& tensor, ReduceOp op) override;
  void do_all_gather(const at::Tensor& output, const at::Tensor& input) override;
  void do_reduce_scatter(const at::Tensor& output, const at::Tensor& input, ReduceOp op) override;
  void do_broadcast(const at::Tensor& tensor, int root) override;
  void do_barrier() override { comm_.barrier(); }
  std::pair<int64_t, int64_t> do_min_max(int64_t value) override { return comm_.min_max(value); }
  std::unique_ptr<Communicator> do_split(int color, const std::string& axis) override {
    return std::make_unique<MpiCommunicator>(comm_.split(color, axis), ledger(), max_elements_);
  }

 private:
  MPI_Op mpi_op(at::ScalarType type, ReduceOp op) const;
  /// Calls transfer(offset, count) for pieces of `numel` elements. MPI libraries multiply a count by the group's size,
  /// so `ranks` times the count stays within the limit.
  template <class Transfer>
  void for_each_piece(int64_t numel, int ranks, Transfer transfer) const;

  MpiComm comm_;
  int64_t max_elements_;
  MpiOp bfloat16_sum_, bfloat16_max_, bfloat16_min_;
};

MPI_Op MpiCommunicator::mpi_op(at::ScalarType type, ReduceOp op) const {
  if (type != at::kBFloat16) return built_in_op(op);
  switch (op) {
    case ReduceOp::sum:
      return bfloat16_sum_.get();
    case ReduceOp::max:
      return bfloat16_max_.get();
    case ReduceOp::min:
      return bfloat16_min_.get();
  }
  throw InternalError("Unknown reduction.");
}

template <class Transfer>
void MpiCommunicator::for_each_piece(int64_t numel, int ranks, Transfer transfer) const {
  const int64_t limit = std::max<int64_t>(1, max_elements_ / ranks);
  for (int64_t offset = 0; offset < numel; offset += limit) {
    transfer(offset, static_cast<int>(std::min(limit, numel - offset)));
  }
}

// MPI requires MPI_Allreduce to give all ranks identical results, so it may be used as it is.
void MpiCommunicator::do_all_reduce(const at::Tensor& tensor, ReduceOp op) {
  const at::ScalarType type = tensor.scalar_type();
  for_each_piece(tensor.numel(), 1, [&](int64_t offset, int count) {
    comm_.check(
        MPI_Allreduce(MPI_IN_PLACE, address(tensor, offset), count, mpi_type(type), mpi_op(type, op), comm_.get()),
        "MPI_Allreduce");
  });
}

void MpiCommunicator::do_all_gather(const at::Tensor& output, const at::Tensor& input) {
  const MPI_Datatype type = mpi_type(input.scalar_type());
  const at::Tensor blocks = output.view({size(), input.numel()});
  for_each_piece(input.numel(), size(), [&](int64_t offset, int count) {
    const at::Tensor target = blocks.narrow(1, offset, count);
    const at::Tensor piece = target.is_contiguous() ? target : at::empty(target.sizes(), target.options());
    comm_.check(MPI_Allgather(address(input, offset), count, type, piece.data_ptr(), count, type, comm_.get()),
                "MPI_Allgather");
    if (!piece.is_same(target)) target.copy_(piece);
  });
}

void MpiCommunicator::do_reduce_scatter(const at::Tensor& output, const at::Tensor& input, ReduceOp op) {
  const at::ScalarType type = input.scalar_type();
  const at::Tensor blocks = input.view({size(), output.numel()});
  for_each_piece(output.numel(), size(), [&](int64_t offset, int count) {
    const at::Tensor piece = blocks.narrow(1, offset, count).contiguous();
    comm_.check(MPI_Reduce_scatter_block(piece.data_ptr(), address(output, offset), count, mpi_type(type),
                                         mpi_op(type, op), comm_.get()),
                "MPI_Reduce_scatter_block");
  });
}

void MpiCommunicator::do_broadcast(const at::Tensor& tensor, int root) {
  for_each_piece(tensor.numel(), 1, [&](int64_t offset, int count) {
    comm_.check(MPI_Bcast(address(tensor, offset), count, mpi_type(tensor.scalar_type()), root, comm_.get()),
                "MPI_Bcast");
  });
}

}  // namespace

std::unique_ptr<Communicator> make_mpi_communicator(const World& world, Ledger& ledger, int64_t max_elements) {
  return std::make_unique<MpiCommunicator>(MpiComm::duplicate(world.comm(), "world"), ledger, max_elements);
}

}  // namespace corank
