// One suite over every backend of the table, and over the solo communicator, at any number of ranks. Built twice in a
// CUDA build: for the CPU backends, and with CORANK_GPU_TEST for those that need a GPU per rank.
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <limits>
#include <thread>

#include "comm/backends.h"
#include "comm/communicator.h"
#include "comm/grad_reducer.h"
#include "comm/mpi_comm.h"
#include "comm/mpi_communicator.h"
#include "configs/error.h"
#include "tests/mpi_main.h"

namespace {

/// Bytes that this process gave to MPI to send: MPI's profiling interface lets a program stand before its functions.
int64_t given_to_mpi = 0;

void give(int count, MPI_Datatype type) {
  int size = 0;
  PMPI_Type_size(type, &size);
  given_to_mpi += static_cast<int64_t>(count) * size;
}

}  // namespace

extern "C" int MPI_Send(const void* data, int count, MPI_Datatype type, int to, int tag, MPI_Comm comm) {
  give(count, type);
  return PMPI_Send(data, count, type, to, tag, comm);
}

extern "C" int MPI_Isend(const void* data, int count, MPI_Datatype type, int to, int tag, MPI_Comm comm,
                         MPI_Request* request) {
  give(count, type);
  return PMPI_Isend(data, count, type, to, tag, comm, request);
}

namespace corank {
namespace {

using ::testing::AssertionFailure;
using ::testing::AssertionResult;
using ::testing::AssertionSuccess;

constexpr Purpose kPurpose = Purpose::tensor_activations;
const std::vector<at::ScalarType> kTypes = {at::kFloat, at::kDouble, at::kBFloat16, at::kInt, at::kLong, at::kByte};
const std::vector<ReduceOp> kOps = {ReduceOp::sum, ReduceOp::max, ReduceOp::min};

const std::vector<std::string> kCpuBackends = {"mpi", "solo"};
const std::vector<std::string> kGpuBackends = {"nccl"};
#ifdef CORANK_GPU_TEST
const std::vector<std::string>& kBackends = kGpuBackends;
#else
const std::vector<std::string>& kBackends = kCpuBackends;
#endif

std::unique_ptr<Communicator> make(const std::string& backend, Ledger& ledger) {
  return backend == "solo" ? make_solo_communicator(at::kCPU, ledger)
                           : make_communicator(backend, test_world(), ledger);
}

// ---- What a rank hands in, and what must come out: integers that every type holds exactly.

at::Tensor pattern(int rank, at::IntArrayRef shape, at::ScalarType type) {
  const int64_t numel = c10::multiply_integers(shape);
  return ((at::arange(numel, at::kLong) * 7 + rank * 5) % 13 + rank).view(shape).to(type);
}

at::Tensor reduced_pattern(int size, at::IntArrayRef shape, at::ScalarType type, ReduceOp op) {
  at::Tensor result = pattern(0, shape, at::kLong);
  for (int rank = 1; rank < size; ++rank) {
    const at::Tensor other = pattern(rank, shape, at::kLong);
    result = op == ReduceOp::sum   ? result + other
             : op == ReduceOp::max ? at::maximum(result, other)
                                   : at::minimum(result, other);
  }
  return result.to(type);
}

AssertionResult matches(const at::Tensor& got, const at::Tensor& expected) {
  const at::Tensor host = got.cpu();
  if (host.scalar_type() == expected.scalar_type() && at::equal(host, expected)) return AssertionSuccess();
  AssertionResult failure = AssertionFailure();
  failure << "got " << host.scalar_type() << " " << host.sizes() << ", expected " << expected.scalar_type() << " "
          << expected.sizes();
  if (host.sizes() != expected.sizes()) return failure;
  const at::Tensor wrong = host.flatten().ne(expected.flatten()).nonzero();
  return failure << "; " << wrong.numel() << " elements differ, the first is " << wrong[0].item<int64_t>();
}

AssertionResult all_reduce_is_exact(Communicator& comm, at::IntArrayRef shape, at::ScalarType type, ReduceOp op) {
  const at::Tensor tensor = pattern(comm.rank(), shape, type).to(comm.device());
  comm.all_reduce(tensor, op, kPurpose);
  return matches(tensor, reduced_pattern(comm.size(), shape, type, op));
}

AssertionResult all_gather_is_exact(Communicator& comm, at::IntArrayRef shape, at::ScalarType type) {
  const at::Tensor input = pattern(comm.rank(), shape, type);
  const at::Tensor on_device = input.to(comm.device());
  std::vector<at::Tensor> parts;
  for (int rank = 0; rank < comm.size(); ++rank) parts.push_back(pattern(rank, shape, type));
  const AssertionResult result = matches(comm.all_gather(on_device, kPurpose), at::cat(parts));
  return result ? matches(on_device, input) : result;
}

/// `shape` is that of the part each rank keeps.
AssertionResult reduce_scatter_is_exact(Communicator& comm, at::IntArrayRef shape, at::ScalarType type, ReduceOp op) {
  std::vector<int64_t> whole = shape.vec();
  whole[0] *= comm.size();
  const at::Tensor input = pattern(comm.rank(), whole, type);
  const at::Tensor on_device = input.to(comm.device());
  const at::Tensor expected = reduced_pattern(comm.size(), whole, type, op).narrow(0, comm.rank() * shape[0], shape[0]);
  const AssertionResult result = matches(comm.reduce_scatter(on_device, op, kPurpose), expected);
  return result ? matches(on_device, input) : result;
}

AssertionResult broadcast_is_exact(Communicator& comm, at::IntArrayRef shape, at::ScalarType type, int root) {
  const at::Tensor tensor = pattern(comm.rank(), shape, type).to(comm.device());
  comm.broadcast(tensor, root, kPurpose);
  return matches(tensor, pattern(root, shape, type));
}

/// All of them, also after a failure: the ranks must not part.
AssertionResult is_exact(Communicator& comm) {
  const std::vector<int64_t> shape = {4, 3};
  const std::vector<AssertionResult> results = {
      all_reduce_is_exact(comm, shape, at::kFloat, ReduceOp::sum),
      all_gather_is_exact(comm, shape, at::kFloat),
      reduce_scatter_is_exact(comm, shape, at::kFloat, ReduceOp::sum),
      broadcast_is_exact(comm, shape, at::kFloat, comm.size() - 1),
  };
  const auto failure = std::find(results.begin(), results.end(), false);
  return failure == results.end() ? AssertionSuccess() : *failure;
}

bool reducible(at::ScalarType type, ReduceOp op) { return type != at::kByte || op != ReduceOp::sum; }

// ---- Bits

/// Collective, through `referee`, which is not the communicator under test.
AssertionResult same_bits_everywhere(Communicator& referee, const at::Tensor& tensor) {
  const at::Tensor bytes = tensor.flatten().view(at::kByte).unsqueeze(0);
  const at::Tensor all = referee.all_gather(bytes, Purpose::startup).cpu();
  for (int64_t rank = 1; rank < all.size(0); ++rank) {
    if (!at::equal(all[rank], all[0])) return AssertionFailure() << "ranks 0 and " << rank << " hold different bits";
  }
  return AssertionSuccess();
}

AssertionResult same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (at::equal(a.flatten().view(at::kByte), b.flatten().view(at::kByte))) return AssertionSuccess();
  return AssertionFailure() << "the bits differ";
}

/// Values of many magnitudes, so that the order of additions shows; other values on each rank.
at::Tensor random_values(int rank, int64_t numel, at::ScalarType type, int64_t seed) {
  const at::Tensor position = at::arange(numel, at::kDouble) + static_cast<double>(rank * 7919 + seed * 104729);
  const at::Tensor mantissa = at::sin(position * 12.9898) * 43758.5453;
  return ((mantissa - at::floor(mantissa) - 0.5) * at::pow(10.0, at::remainder(position, 9) - 4)).to(type);
}

// ---- Faults

enum class Fault {
  none,
  all_reduce_forgets_a_rank,
  all_reduce_misses_a_bit,
  all_gather_out_of_order,
  reduce_scatter_keeps_wrong_block,
  broadcast_misses_a_rank,
};

/// A working communicator around another, but for one planted fault, which shows on the last rank.
class FaultyCommunicator final : public Communicator {
 public:
  FaultyCommunicator(Communicator& inner, Ledger& ledger, Fault fault)
      : Communicator(inner.ring(), "faulty", inner.device(), ledger), inner_(inner), fault_(fault) {}

 protected:
  void do_all_reduce(const at::Tensor& tensor, ReduceOp op) override {
    if (on_last(Fault::all_reduce_forgets_a_rank)) tensor.zero_();
    inner_.all_reduce(tensor, op, kPurpose);
    if (on_last(Fault::all_reduce_misses_a_bit)) tensor.flatten().view(at::kByte)[0].bitwise_xor_(1);
  }
  void do_all_gather(const at::Tensor& output, const at::Tensor& input) override {
    const at::Tensor all = inner_.all_gather(input, kPurpose);
    output.copy_(on_last(Fault::all_gather_out_of_order) ? all.roll(input.size(0), 0) : all);
  }
  void do_reduce_scatter(const at::Tensor& output, const at::Tensor& input, ReduceOp op) override {
    const at::Tensor sum = input.clone();
    inner_.all_reduce(sum, op, kPurpose);
    const int block = on_last(Fault::reduce_scatter_keeps_wrong_block) ? 0 : rank();
    output.copy_(sum.narrow(0, block * output.size(0), output.size(0)));
  }
  void do_broadcast(const at::Tensor& tensor, int root) override {
    const at::Tensor received = tensor.clone();
    inner_.broadcast(received, root, kPurpose);
    if (fault_ != Fault::broadcast_misses_a_rank || rank() != 0) tensor.copy_(received);
  }
  void do_barrier() override { inner_.barrier(); }
  std::pair<int64_t, int64_t> do_min_max(int64_t value) override { return {value, value}; }
  std::unique_ptr<Communicator> do_split(int color, const std::string& axis) override {
    return inner_.split(color, axis);
  }

 private:
  bool on_last(Fault fault) const { return fault_ == fault && rank() == size() - 1; }

  Communicator& inner_;
  Fault fault_;
};

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

class CommunicatorTest : public ::testing::TestWithParam<std::string> {
 protected:
  CommunicatorTest() : comm_(make(GetParam(), ledger_)) { comm_->set_cross_check(true); }

  at::Tensor zeros(at::IntArrayRef shape, at::ScalarType type = at::kFloat) const {
    return at::zeros(shape, at::device(comm_->device()).dtype(type));
  }
  at::Tensor ones(at::IntArrayRef shape, at::ScalarType type = at::kFloat) const { return zeros(shape, type).add_(1); }
  /// Collective. True if `result` failed on any rank.
  bool fails_somewhere(const AssertionResult& result) {
    const at::Tensor failed = ones({1}, at::kInt) * (result ? 0 : 1);
    comm_->all_reduce(failed, ReduceOp::max, Purpose::startup);
    return failed.item<int>() == 1;
  }
  /// Calls `odd` on the last rank and `usual` on the others; all must find that out.
  void expect_disagreement(const std::string& field, const std::function<void()>& usual,
                           const std::function<void()>& odd) {
    if (comm_->size() == 1) return;
    const bool last = comm_->rank() == comm_->size() - 1;
    try {
      (last ? odd : usual)();
      ADD_FAILURE() << "no disagreement about the " << field;
    } catch (const DisagreeError& error) {
      EXPECT_TRUE(contains(error.what(), field)) << error.what();
      EXPECT_TRUE(contains(error.what(), "Rank " + std::to_string(comm_->rank()))) << error.what();
    }
  }
  Traffic traffic() const { return ledger_.at(kPurpose); }
  /// The traffic of `call`, its time left out.
  Traffic traffic_of(const std::function<void()>& call) const {
    const Traffic before = traffic();
    call();
    Traffic result = traffic() - before;
    result.seconds = 0;
    return result;
  }
  /// What a collective over ranks of one host, which these are, must count for one call with `tensor`.
  Traffic expected_traffic(Collective collective, const at::Tensor& tensor) const {
    const int64_t n = comm_->size(), payload = static_cast<int64_t>(tensor.nbytes());
    if (n == 1) return {};
    switch (collective) {
      case Collective::all_reduce:
        return {1, payload, 2 * (n - 1) * payload / n, 0};
      case Collective::all_gather:
        return {1, payload, (n - 1) * payload, 0};
      case Collective::reduce_scatter:
        return {1, payload, (n - 1) * payload / n, 0};
      default:  // broadcast by rank 0: the ring ends at rank 1
        return {1, payload, comm_->rank() == 1 ? 0 : payload, 0};
    }
  }

  Ledger ledger_;
  std::unique_ptr<Communicator> comm_;
};

INSTANTIATE_TEST_SUITE_P(Backends, CommunicatorTest, ::testing::ValuesIn(kBackends),
                         [](const auto& backend) { return backend.param; });

TEST_P(CommunicatorTest, KnowsItsPlace) {
  const bool solo = GetParam() == "solo";
  EXPECT_EQ(comm_->rank(), solo ? 0 : test_world().rank());
  EXPECT_EQ(comm_->size(), solo ? 1 : test_world().size());
  EXPECT_EQ(comm_->axis(), "world");
  if (comm_->device().is_cuda()) {
    EXPECT_EQ(comm_->device().index(), test_world().local_rank());
  }
}

TEST_P(CommunicatorTest, AllReduceIsExact) {
  for (const at::ScalarType type : kTypes) {
    for (const ReduceOp op : kOps) {
      if (!reducible(type, op)) continue;
      for (const int64_t numel : {1, 2, 3, 5, 17, 1000, 4099}) {
        EXPECT_TRUE(all_reduce_is_exact(*comm_, {numel}, type, op))
            << type << " op " << static_cast<int>(op) << " elements " << numel;
      }
    }
  }
}

TEST_P(CommunicatorTest, AllGatherIsExact) {
  for (const at::ScalarType type : kTypes) {
    EXPECT_TRUE(all_gather_is_exact(*comm_, {1}, type)) << type;
    EXPECT_TRUE(all_gather_is_exact(*comm_, {5, 3}, type)) << type;
    EXPECT_TRUE(all_gather_is_exact(*comm_, {2, 3, 4}, type)) << type;
  }
}

TEST_P(CommunicatorTest, ReduceScatterIsExact) {
  for (const at::ScalarType type : kTypes) {
    for (const ReduceOp op : kOps) {
      if (!reducible(type, op)) continue;
      EXPECT_TRUE(reduce_scatter_is_exact(*comm_, {1}, type, op)) << type;
      EXPECT_TRUE(reduce_scatter_is_exact(*comm_, {3, 5}, type, op)) << type;
      EXPECT_TRUE(reduce_scatter_is_exact(*comm_, {513, 2}, type, op)) << type;
    }
  }
}

TEST_P(CommunicatorTest, BroadcastIsExactFromEveryRoot) {
  for (const at::ScalarType type : kTypes) {
    for (int root = 0; root < comm_->size(); ++root) {
      EXPECT_TRUE(broadcast_is_exact(*comm_, {7, 3}, type, root)) << type << " root " << root;
    }
  }
}

TEST_P(CommunicatorTest, EmptyTensorsKeepTheirShape) {
  const at::Tensor empty = zeros({0, 3});
  comm_->all_reduce(empty, ReduceOp::sum, kPurpose);
  comm_->broadcast(empty, 0, kPurpose);
  EXPECT_EQ(comm_->all_gather(empty, kPurpose).sizes(), at::IntArrayRef({0, 3}));
  EXPECT_EQ(comm_->reduce_scatter(empty, ReduceOp::sum, kPurpose).sizes(), at::IntArrayRef({0, 3}));
  EXPECT_EQ(comm_->all_gather(zeros({2, 0}), kPurpose).sizes(), at::IntArrayRef({2 * comm_->size(), 0}));
  EXPECT_EQ(traffic().payload_bytes, 0);
  EXPECT_TRUE(is_exact(*comm_));
}

TEST_P(CommunicatorTest, BigTensorsAreExact) {
  const int64_t numel = (int64_t{1} << 20) + 3;  // 4 MB and a rest that no block size divides
  EXPECT_TRUE(all_reduce_is_exact(*comm_, {numel}, at::kFloat, ReduceOp::sum));
  EXPECT_TRUE(all_reduce_is_exact(*comm_, {numel}, at::kBFloat16, ReduceOp::sum));
  EXPECT_TRUE(all_gather_is_exact(*comm_, {numel}, at::kFloat));
  EXPECT_TRUE(reduce_scatter_is_exact(*comm_, {numel / 4}, at::kFloat, ReduceOp::sum));
  EXPECT_TRUE(reduce_scatter_is_exact(*comm_, {numel / 4}, at::kBFloat16, ReduceOp::max));
  EXPECT_TRUE(broadcast_is_exact(*comm_, {numel}, at::kDouble, comm_->size() - 1));
}

TEST_P(CommunicatorTest, Bfloat16AddsInFloat32AndRoundsToEven) {
  if (comm_->size() == 1) return;
  // 256 and up are 2 apart: 257 lies half-way and goes to 256, 259 to 260.
  const std::vector<std::pair<double, double>> cases = {{256, 256}, {258, 260}, {-256, -256 + 1}, {1, 2}};
  for (const auto& [value, expected] : cases) {
    const double mine = comm_->rank() == 0 ? value : comm_->rank() == 1 ? 1 : 0;
    const at::Tensor tensor = zeros({33}, at::kBFloat16).fill_(mine);
    comm_->all_reduce(tensor, ReduceOp::sum, kPurpose);
    EXPECT_EQ(tensor[0].item<double>(), expected);
    EXPECT_EQ(tensor[32].item<double>(), expected);
  }
}

TEST_P(CommunicatorTest, InfinityAndNanSurviveASum) {
  for (const at::ScalarType type : {at::kFloat, at::kDouble, at::kBFloat16}) {
    const at::Tensor tensor = zeros({2}, type);
    if (comm_->rank() == comm_->size() - 1) {
      tensor[0].fill_(std::numeric_limits<double>::infinity());
      tensor[1].fill_(std::numeric_limits<double>::quiet_NaN());
    }
    comm_->all_reduce(tensor, ReduceOp::sum, kPurpose);
    EXPECT_TRUE(tensor[0].isinf().item<bool>()) << type;
    EXPECT_TRUE(tensor[1].isnan().item<bool>()) << type;
  }
}

TEST_P(CommunicatorTest, ReductionsOfExtremesAreExact) {
  const int64_t big = int64_t{1} << 60;
  const at::Tensor tensor = zeros({1}, at::kLong).fill_(big + comm_->rank());
  comm_->all_reduce(tensor, ReduceOp::max, kPurpose);
  EXPECT_EQ(tensor.item<int64_t>(), big + comm_->size() - 1);
  const at::Tensor negative = zeros({1}, at::kInt).fill_(-5 - comm_->rank());
  comm_->all_reduce(negative, ReduceOp::min, kPurpose);
  EXPECT_EQ(negative.item<int>(), -5 - (comm_->size() - 1));
}

TEST_P(CommunicatorTest, GradientsDoNotFlow) {
  const at::Tensor parameter = ones({4 * comm_->size()}).set_requires_grad(true);
  comm_->broadcast(parameter, 0, kPurpose);
  EXPECT_TRUE(parameter.is_leaf());
  if (comm_->size() == 1) return;
  FaultyCommunicator copying(*comm_, ledger_, Fault::none);  // a backend that computes with tensors
  for (Communicator* comm : {comm_.get(), static_cast<Communicator*>(&copying)}) {
    EXPECT_FALSE(comm->all_gather(parameter, kPurpose).requires_grad());
    EXPECT_FALSE(comm->reduce_scatter(parameter, ReduceOp::sum, kPurpose).requires_grad());
  }
}

TEST_P(CommunicatorTest, FollowsTheCallersStream) {
  const c10::impl::VirtualGuardImpl guard(comm_->device().type());
  const at::Device device = comm_->device();
  const c10::StreamGuard stream(device.is_cuda() ? guard.getStreamFromGlobalPool(device) : guard.getStream(device));
  const int64_t side = device.is_cuda() ? 2048 : 64;
  at::Tensor value = ones({side, side});
  for (int i = 0; i < 10; ++i) value = at::matmul(value, ones({side, side})) / side;  // slow work before ...
  comm_->all_reduce(value, ReduceOp::sum, kPurpose);
  value = value * 2;  // ... and work after, with no synchronisation
  const at::Tensor gathered = comm_->all_gather(value.slice(0, 0, 1).contiguous(), kPurpose) + 1;
  EXPECT_EQ(value.min().item<float>(), 2 * comm_->size());
  EXPECT_EQ(value.max().item<float>(), 2 * comm_->size());
  EXPECT_TRUE(gathered.eq(2 * comm_->size() + 1).all().item<bool>());
}

TEST_P(CommunicatorTest, BarrierWaitsForTheLast) {
  using Clock = std::chrono::steady_clock;
  comm_->barrier();
  const Clock::time_point start = Clock::now();
  if (comm_->rank() == 0) std::this_thread::sleep_for(std::chrono::milliseconds(100));
  comm_->barrier();
  if (comm_->size() > 1) {
    EXPECT_GE(Clock::now() - start, std::chrono::milliseconds(50));
  }
  EXPECT_EQ(ledger_.snapshot(), Ledger::Snapshot{});
}

// ---- Groups

TEST_P(CommunicatorTest, SplitOrdersByRank) {
  const auto group = comm_->split(comm_->rank() % 2, "dp");
  EXPECT_EQ(group->axis(), "dp");
  EXPECT_EQ(group->rank(), comm_->rank() / 2);
  EXPECT_EQ(group->size(), (comm_->size() + 1 - comm_->rank() % 2) / 2);
  EXPECT_EQ(group->device(), comm_->device());
  EXPECT_TRUE(is_exact(*group));
}

TEST_P(CommunicatorTest, SplitsNest) {
  const auto lower = comm_->split(comm_->rank() / 3, "outer");  // 4 ranks: three and one
  const auto inner = lower->split(lower->rank() % 2, "inner");
  EXPECT_EQ(inner->size(), (lower->size() + 1 - lower->rank() % 2) / 2);
  EXPECT_TRUE(is_exact(*inner));
  EXPECT_TRUE(is_exact(*lower));
  EXPECT_TRUE(is_exact(*comm_));
}

TEST_P(CommunicatorTest, RanksWorkInSeveralGroups) {
  const auto pairs = comm_->split(comm_->rank() / 2, "pairs");
  const auto stride = comm_->split(comm_->rank() % 2, "stride");
  for (int round = 0; round < 5; ++round) {
    EXPECT_TRUE(is_exact(*pairs));
    EXPECT_TRUE(is_exact(*stride));
    EXPECT_TRUE(is_exact(*comm_));
  }
}

TEST_P(CommunicatorTest, GroupsOutliveTheirParent) {
  const auto group = comm_->split(0, "all");
  comm_.reset();
  EXPECT_TRUE(is_exact(*group));
}

TEST_P(CommunicatorTest, AGroupOfOneReturnsItsInputAndCountsNothing) {
  const auto alone = comm_->split(comm_->rank(), "alone");
  ASSERT_EQ(alone->size(), 1);
  const at::Tensor tensor = ones({4});
  alone->all_reduce(tensor, ReduceOp::sum, kPurpose);
  alone->broadcast(tensor, 0, kPurpose);
  alone->barrier();
  EXPECT_TRUE(alone->all_gather(tensor, kPurpose).is_same(tensor));
  EXPECT_TRUE(alone->reduce_scatter(tensor, ReduceOp::sum, kPurpose).is_same(tensor));
  EXPECT_TRUE(tensor.eq(1).all().item<bool>());
  EXPECT_EQ(ledger_.snapshot(), Ledger::Snapshot{});
}

// ---- Wrong arguments

TEST_P(CommunicatorTest, RefusesWrongArgumentsBeforeSending) {
  struct Case {
    std::string reason;
    std::function<void()> call;
  };
  const at::Tensor good = ones({4 * comm_->size()});
  const at::Tensor strided = ones({4, 6}).t();
  const at::Tensor elsewhere = at::empty({4}, at::device(at::kMeta).dtype(at::kFloat));
  Communicator& comm = *comm_;
  const std::vector<Case> cases = {
      {"undefined", [&] { comm.all_reduce({}, ReduceOp::sum, kPurpose); }},
      {"not contiguous", [&] { comm.all_reduce(strided, ReduceOp::sum, kPurpose); }},
      {"not contiguous", [&] { comm.all_gather(strided, kPurpose); }},
      {"not contiguous", [&] { comm.reduce_scatter(strided, ReduceOp::sum, kPurpose); }},
      {"not contiguous", [&] { comm.broadcast(strided, 0, kPurpose); }},
      {"is on meta", [&] { comm.all_reduce(elsewhere, ReduceOp::sum, kPurpose); }},
      {"is on meta", [&] { comm.all_gather(elsewhere, kPurpose); }},
      {"of type Half", [&] { comm.all_reduce(good.to(at::kHalf), ReduceOp::sum, kPurpose); }},
      {"of type Bool", [&] { comm.broadcast(good.to(at::kBool), 0, kPurpose); }},
      {"would overflow", [&] { comm.all_reduce(good.to(at::kByte), ReduceOp::sum, kPurpose); }},
      {"would overflow", [&] { comm.reduce_scatter(good.to(at::kByte), ReduceOp::sum, kPurpose); }},
      {"no dim 0", [&] { comm.all_gather(zeros({}), kPurpose); }},
      {"does not divide", [&] { comm.reduce_scatter(zeros({}), ReduceOp::sum, kPurpose); }},
      {"not a rank", [&] { comm.broadcast(good, -1, kPurpose); }},
      {"not a rank", [&] { comm.broadcast(good, comm.size(), kPurpose); }},
      {"negative", [&] { comm.split(-1, "x"); }},
  };
  for (const Case& item : cases) {
    EXPECT_THROW(item.call(), InternalError) << item.reason;
    EXPECT_TRUE(contains(message_of(item.call), item.reason)) << message_of(item.call);
  }
  if (comm.size() > 1) {
    EXPECT_THROW(comm.reduce_scatter(ones({comm.size() + 1}), ReduceOp::sum, kPurpose), InternalError);
  }
  EXPECT_EQ(ledger_.snapshot(), Ledger::Snapshot{});
  EXPECT_TRUE(is_exact(comm));  // nothing was sent: the group works on
}

TEST_P(CommunicatorTest, RefusesTheOtherDevice) {
  if (!comm_->device().is_cuda()) return;
  EXPECT_THROW(comm_->all_reduce(at::ones({4}), ReduceOp::sum, kPurpose), InternalError);
}

// ---- Cross-check

TEST_P(CommunicatorTest, CrossCheckFindsAnotherSize) {
  const auto call = [&](int64_t numel) { comm_->all_reduce(ones({numel}), ReduceOp::sum, kPurpose); };
  expect_disagreement(
      "number of elements", [&] { call(4); }, [&] { call(5); });
}

TEST_P(CommunicatorTest, CrossCheckFindsAnEmptyTensor) {
  const auto call = [&](int64_t numel) { comm_->all_reduce(ones({numel}), ReduceOp::sum, kPurpose); };
  expect_disagreement(
      "number of elements", [&] { call(4); }, [&] { call(0); });
}

TEST_P(CommunicatorTest, CrossCheckFindsAnotherType) {
  const auto call = [&](at::ScalarType type) { comm_->all_gather(ones({4}, type), kPurpose); };
  expect_disagreement(
      "type", [&] { call(at::kFloat); }, [&] { call(at::kInt); });
}

TEST_P(CommunicatorTest, CrossCheckFindsAnotherReduction) {
  const auto call = [&](ReduceOp op) { comm_->reduce_scatter(ones({4 * comm_->size()}), op, kPurpose); };
  expect_disagreement(
      "reduction", [&] { call(ReduceOp::sum); }, [&] { call(ReduceOp::max); });
}

TEST_P(CommunicatorTest, CrossCheckFindsAnotherRoot) {
  const auto call = [&](int root) { comm_->broadcast(ones({4}), root, kPurpose); };
  expect_disagreement(
      "root", [&] { call(0); }, [&] { call(1); });
}

TEST_P(CommunicatorTest, CrossCheckFindsAnotherOperation) {
  expect_disagreement(
      "operation", [&] { comm_->broadcast(ones({4}), 0, kPurpose); },
      [&] { comm_->all_reduce(ones({4}), ReduceOp::sum, kPurpose); });
  expect_disagreement(
      "operation", [&] { comm_->barrier(); }, [&] { comm_->all_reduce(ones({4}), ReduceOp::sum, kPurpose); });
  expect_disagreement(
      "operation", [&] { comm_->barrier(); }, [&] { comm_->split(0, "x"); });
}

TEST_P(CommunicatorTest, CrossCheckFindsSwappedCalls) {
  const auto call = [&](Purpose purpose) { comm_->all_reduce(ones({1}), ReduceOp::sum, purpose); };
  expect_disagreement(
      "purpose", [&] { call(Purpose::gradient_norm); }, [&] { call(Purpose::data_control); });
}

TEST_P(CommunicatorTest, CrossCheckFindsACallTooMany) {
  comm_->set_cross_check(false);
  if (comm_->rank() == comm_->size() - 1) comm_->broadcast(zeros({0}), 0, kPurpose);  // nothing to send: no hang
  comm_->set_cross_check(true);
  const auto call = [&] { comm_->all_reduce(ones({4}), ReduceOp::sum, kPurpose); };
  expect_disagreement("sequence number", call, call);
}

TEST_P(CommunicatorTest, CrossCheckReachesGroupsAndCountsNothing) {
  comm_ = comm_->split(0, "all");
  const auto call = [&](int64_t numel) { comm_->all_reduce(ones({numel}), ReduceOp::sum, kPurpose); };
  expect_disagreement(
      "number of elements", [&] { call(4); }, [&] { call(5); });
  EXPECT_EQ(ledger_.snapshot(), Ledger::Snapshot{});
}

// ---- Bytes and time

TEST_P(CommunicatorTest, CountsBytesExactly) {
  const int64_t n = comm_->size();
  for (const at::ScalarType type : kTypes) {
    const at::Tensor tensor = ones({12 * n, 5}, type);
    EXPECT_EQ(traffic_of([&] { comm_->all_reduce(tensor, ReduceOp::max, kPurpose); }),
              expected_traffic(Collective::all_reduce, tensor));
    EXPECT_EQ(traffic_of([&] { comm_->all_gather(tensor, kPurpose); }),
              expected_traffic(Collective::all_gather, tensor));
    EXPECT_EQ(traffic_of([&] { comm_->reduce_scatter(tensor, ReduceOp::max, kPurpose); }),
              expected_traffic(Collective::reduce_scatter, tensor));
    EXPECT_EQ(traffic_of([&] { comm_->broadcast(tensor, 0, kPurpose); }),
              expected_traffic(Collective::broadcast, tensor));
  }
  EXPECT_EQ(ledger_.at(Purpose::startup), Traffic{});
}

TEST_P(CommunicatorTest, CountsUnderTheNamedPurposeInEveryGroup) {
  const auto group = comm_->split(0, "all");
  group->all_reduce(ones({3}), ReduceOp::sum, Purpose::vocabulary_loss);
  comm_->all_reduce(ones({5}), ReduceOp::sum, Purpose::vocabulary_loss);
  EXPECT_EQ(ledger_.at(Purpose::vocabulary_loss).payload_bytes, comm_->size() > 1 ? 32 : 0);
  EXPECT_EQ(traffic(), Traffic{});
}

TEST_P(CommunicatorTest, TimesOnlyWhatItCanTime) {
  const at::Tensor tensor = ones({100000});
  comm_->all_reduce(tensor, ReduceOp::sum, kPurpose);
  const bool timed = comm_->device().is_cpu() && comm_->size() > 1;
  EXPECT_EQ(traffic().seconds > 0, timed);
  ledger_.set_timing(true);
  const double before = traffic().seconds;
  comm_->all_reduce(tensor, ReduceOp::sum, kPurpose);
  EXPECT_EQ(traffic().seconds > before, comm_->size() > 1);
}

// ---- Bits

TEST_P(CommunicatorTest, AllRanksReceiveTheSameBits) {
  if (comm_->size() == 1) return;
  const std::vector<int64_t> sizes = {1,    2,    3,     7,     16,    33,     100,    511,     1025,
                                      2500, 4097, 10000, 16385, 65537, 100003, 262145, 1000003, 3000017};
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kDouble}) {
    for (const int64_t numel : sizes) {
      if (type != at::kFloat && numel > 300000) continue;
      const at::Tensor tensor = random_values(comm_->rank(), numel, type, 1).to(comm_->device());
      comm_->all_reduce(tensor, ReduceOp::sum, kPurpose);
      EXPECT_TRUE(same_bits_everywhere(*comm_, tensor)) << type << " elements " << numel;
    }
  }
}

TEST_P(CommunicatorTest, TwoRunsGiveTheSameBits) {
  for (const int64_t numel : {1, 17, 1025, 65537, 1000003}) {
    const at::Tensor input = random_values(comm_->rank(), numel, at::kFloat, 2).to(comm_->device());
    const at::Tensor first = input.clone(), second = input.clone();
    comm_->all_reduce(first, ReduceOp::sum, kPurpose);
    comm_->all_reduce(second, ReduceOp::sum, kPurpose);
    EXPECT_TRUE(same_bits(first, second)) << "all_reduce of " << numel;
    const at::Tensor blocks = input.repeat({comm_->size()});
    EXPECT_TRUE(same_bits(comm_->reduce_scatter(blocks, ReduceOp::sum, kPurpose),
                          comm_->reduce_scatter(blocks, ReduceOp::sum, kPurpose)))
        << "reduce_scatter of " << numel;
  }
}

// ---- The checks above find planted faults

TEST_P(CommunicatorTest, PlantedFaultsAreFound) {
  Ledger ledger;
  FaultyCommunicator sound(*comm_, ledger, Fault::none);
  EXPECT_TRUE(is_exact(sound));
  if (comm_->size() == 1) return;
  for (const Fault fault :
       {Fault::all_reduce_forgets_a_rank, Fault::all_reduce_misses_a_bit, Fault::all_gather_out_of_order,
        Fault::reduce_scatter_keeps_wrong_block, Fault::broadcast_misses_a_rank}) {
    FaultyCommunicator faulty(*comm_, ledger, fault);
    EXPECT_TRUE(fails_somewhere(is_exact(faulty))) << "fault " << static_cast<int>(fault);
  }
}

TEST_P(CommunicatorTest, APlantedBitIsFound) {
  if (comm_->size() == 1) return;
  Ledger ledger;
  FaultyCommunicator faulty(*comm_, ledger, Fault::all_reduce_misses_a_bit);
  const at::Tensor tensor = random_values(comm_->rank(), 1000, at::kFloat, 3).to(comm_->device());
  faulty.all_reduce(tensor, ReduceOp::sum, kPurpose);
  EXPECT_FALSE(same_bits_everywhere(*comm_, tensor));
}

// ---- Mesh and gradients

TEST_P(CommunicatorTest, MeshHasNeighboursInTensorGroups) {
  for (int tensor = 1; tensor <= comm_->size(); ++tensor) {
    auto world = make(GetParam(), ledger_);
    if (comm_->size() % tensor != 0) {
      const std::string text = message_of([&] { Mesh(std::move(world), tensor); });
      EXPECT_TRUE(contains(text, "parallel.tensor: " + std::to_string(tensor) + " does not divide")) << text;
      continue;
    }
    const Mesh mesh(std::move(world), tensor);
    EXPECT_EQ(mesh.tp().size(), tensor);
    EXPECT_EQ(mesh.dp().size(), comm_->size() / tensor);
    EXPECT_EQ(mesh.world().rank(), mesh.dp().rank() * tensor + mesh.tp().rank());
    EXPECT_EQ(mesh.tp().axis(), "tp");
    EXPECT_EQ(mesh.dp().axis(), "dp");
    EXPECT_EQ(mesh.device(), comm_->device());
    for (const Axis axis : {Axis::world, Axis::dp, Axis::tp}) {
      const Ring& ring = mesh.group(axis).ring();
      EXPECT_EQ(ring, ring_of(axis, comm_->ring().hosts(), tensor, comm_->rank()));
      EXPECT_EQ(ring.rank(), mesh.group(axis).rank());
      EXPECT_EQ(ring.size(), mesh.group(axis).size());
    }
    EXPECT_TRUE(is_exact(mesh.tp()));
    EXPECT_TRUE(is_exact(mesh.dp()));
    EXPECT_TRUE(is_exact(mesh.world()));
  }
}

TEST_P(CommunicatorTest, MeshRefusesWhatDoesNotDivide) {
  for (const int tensor : {-1, 0, comm_->size() + 1, 2 * comm_->size()}) {
    EXPECT_THROW(Mesh(make(GetParam(), ledger_), tensor), ConfigError) << tensor;
  }
}

TEST_P(CommunicatorTest, GradReducerSumsOverTheRightRanks) {
  for (int tensor = 1; tensor <= comm_->size(); ++tensor) {
    if (comm_->size() % tensor != 0) continue;
    const Mesh mesh(make(GetParam(), ledger_), tensor);
    const int world_rank = mesh.world().rank();
    const at::Tensor everywhere = zeros({5}).fill_(1 << world_rank);
    const at::Tensor data = zeros({7}).fill_(1 << world_rank);
    GradReducer reducer(mesh, everywhere, data, Purpose::adapter_gradients);
    const int64_t before = ledger_.at(Purpose::adapter_gradients).payload_bytes;
    reducer.reduce();
    int dp_sum = 0;
    for (int rank = mesh.tp().rank(); rank < comm_->size(); rank += tensor) dp_sum += 1 << rank;
    EXPECT_TRUE(everywhere.eq((1 << comm_->size()) - 1).all().item<bool>()) << everywhere;
    EXPECT_TRUE(data.eq(dp_sum).all().item<bool>()) << data;
    EXPECT_EQ(ledger_.at(Purpose::adapter_gradients).payload_bytes - before, reducer.payload_bytes());
    EXPECT_EQ(reducer.payload_bytes(), (comm_->size() > 1 ? 20 : 0) + (mesh.dp().size() > 1 ? 28 : 0));
  }
}

TEST_P(CommunicatorTest, GradReducerTakesEmptyPartsAndRefusesWrongOnes) {
  const Mesh mesh(make(GetParam(), ledger_), 1);
  GradReducer reducer(mesh, zeros({0}), zeros({0}), Purpose::weight_gradients);
  reducer.reduce();
  EXPECT_EQ(reducer.payload_bytes(), 0);
  const Purpose good = Purpose::adapter_gradients;
  EXPECT_THROW(GradReducer(mesh, zeros({2, 2}), zeros({0}), good), InternalError);
  EXPECT_THROW(GradReducer(mesh, zeros({0}), zeros({4}, at::kBFloat16), good), InternalError);
  EXPECT_THROW(GradReducer(mesh, {}, zeros({4}), good), InternalError);
  EXPECT_THROW(GradReducer(mesh, zeros({8}).slice(0, 0, 8, 2), zeros({0}), good), InternalError);
  EXPECT_THROW(GradReducer(mesh, zeros({4}), zeros({0}), Purpose::startup), InternalError);
}

// ---- What is not per backend

TEST(Backends, TableHoldsTheDefault) {
  const std::vector<std::string> names = backend_names();
  EXPECT_EQ(names.front(), "mpi");
  EXPECT_NE(std::find(names.begin(), names.end(), default_backend()), names.end());
}

TEST(Backends, EveryOneOfTheTableIsTested) {
  for (const std::string& name : backend_names()) {
    const auto count = std::count(kCpuBackends.begin(), kCpuBackends.end(), name) +
                       std::count(kGpuBackends.begin(), kGpuBackends.end(), name);
    EXPECT_EQ(count, 1) << name;
  }
}

TEST(Backends, UnknownNameIsRefusedWithTheListOfThisBuild) {
  Ledger ledger;
  const std::string text = message_of([&] { make_communicator("gloo", test_world(), ledger); });
  EXPECT_TRUE(contains(text, "parallel.backend: \"gloo\" is not in this build, which has: mpi")) << text;
  EXPECT_THROW(make_communicator("", test_world(), ledger), ConfigError);
}

TEST(MpiBackend, CutsLongTensorsIntoPieces) {
  Ledger ledger;
  for (const int64_t limit : {1, 3, 7, 16}) {
    const auto comm = make_mpi_communicator(test_world(), ledger, {.max_message_bytes = limit});
    for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kLong}) {
      EXPECT_TRUE(all_reduce_is_exact(*comm, {11, 3}, type, ReduceOp::sum)) << limit;
      EXPECT_TRUE(all_gather_is_exact(*comm, {11, 3}, type)) << limit;
      EXPECT_TRUE(reduce_scatter_is_exact(*comm, {11, 3}, type, ReduceOp::sum)) << limit;
      EXPECT_TRUE(broadcast_is_exact(*comm, {11, 3}, type, comm->size() - 1)) << limit;
    }
    EXPECT_TRUE(is_exact(*comm->split(comm->rank() % 2, "half")));
  }
}

/// What is counted as sent, and what MPI was given, for one collective of every kind with `numel` elements a rank.
std::vector<std::pair<int64_t, int64_t>> counted_and_given(Communicator& comm, const Ledger& ledger, int64_t numel) {
  const at::Tensor part = at::ones({numel}), blocks = at::ones({numel * comm.size()});
  const std::vector<std::function<void()>> calls = {[&] { comm.all_reduce(part, ReduceOp::sum, kPurpose); },
                                                    [&] { comm.all_gather(part, kPurpose); },
                                                    [&] { comm.reduce_scatter(blocks, ReduceOp::sum, kPurpose); },
                                                    [&] { comm.broadcast(part, comm.size() - 1, kPurpose); }};
  std::vector<std::pair<int64_t, int64_t>> all;
  for (const auto& call : calls) {
    const int64_t counted = ledger.at(kPurpose).sent_bytes, given = given_to_mpi;
    call();
    all.emplace_back(ledger.at(kPurpose).sent_bytes - counted, given_to_mpi - given);
  }
  return all;
}

TEST(MpiBackend, SentBytesAreThoseThatMpiWasGiven) {
  Ledger ledger;
  const auto comm = make_mpi_communicator(test_world(), ledger, {.host = test_world().rank() / 2});
  for (const int64_t numel : {0, 1, 2, 3, 5, 7, 1000, 1003, 700001}) {
    for (const auto& [counted, given] : counted_and_given(*comm, ledger, numel)) EXPECT_EQ(counted, given) << numel;
  }
}

TEST(MpiBackend, ACountOfAnotherPlaceInTheRingIsFound) {
  if (test_world().size() == 1) return;
  Ledger ledger;
  const auto comm = make_mpi_communicator(test_world(), ledger);
  const int64_t before = given_to_mpi;
  comm->broadcast(at::ones({5}), 0, kPurpose);
  const Transfer transfer{Collective::broadcast, 5, 4, /*root=*/0};
  const Ring elsewhere(comm->ring().hosts(), comm->rank() == 1 ? 0 : 1);  // planted
  EXPECT_NE(ring_bytes(transfer, elsewhere), given_to_mpi - before);
}

TEST(MpiBackend, RingsGoHostByHost) {
  const int rank = test_world().rank(), size = test_world().size();
  const std::vector<std::function<int(int)>> hosts_of = {[](int) { return 0; }, [](int r) { return r / 2; },
                                                         [](int r) { return r % 2; }, [](int r) { return r; }};
  for (const auto& host_of : hosts_of) {
    std::vector<int> hosts;
    for (int r = 0; r < size; ++r) hosts.push_back(host_of(r));
    Ledger ledger;
    const auto comm = make_mpi_communicator(test_world(), ledger, {.host = host_of(rank)});
    EXPECT_EQ(comm->ring(), Ring(hosts, rank));
    EXPECT_TRUE(is_exact(*comm));
    const auto half = comm->split(rank % 2, "half");
    EXPECT_EQ(half->ring(), ring_of(Axis::dp, hosts, 2, rank));
    EXPECT_TRUE(is_exact(*half));
    // The sum of a random tensor is the same bits everywhere, however the ring goes.
    const at::Tensor tensor = random_values(rank, 1003, at::kFloat, 4);
    comm->all_reduce(tensor, ReduceOp::sum, kPurpose);
    EXPECT_TRUE(same_bits_everywhere(*comm, tensor));
  }
}

TEST(MpiComm, ErrorsNameOperationGroupAndRank) {
  const MpiComm comm = MpiComm::duplicate(test_world().comm(), "dp");
  int value = 0;
  const std::string text =
      message_of([&] { comm.check(MPI_Bcast(&value, 1, MPI_INT, comm.size(), comm.get()), "MPI_Bcast"); });
  EXPECT_TRUE(contains(text, "MPI_Bcast over dp failed on rank " + std::to_string(comm.rank()))) << text;
  EXPECT_TRUE(contains(text, "MPI_ERR_ROOT")) << text;
}

TEST(World, KnowsHostAndJob) {
  const World& world = test_world();
  EXPECT_GE(world.local_rank(), 0);
  EXPECT_LT(world.local_rank(), world.local_size());
  EXPECT_LE(world.local_size(), world.size());
  EXPECT_TRUE(started_by_mpi());
  EXPECT_THROW(World(nullptr, nullptr), InternalError);
}

}  // namespace
}  // namespace corank
