#include "comm/communicator.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <optional>
#include <sstream>

#include "configs/error.h"

namespace corank {
namespace {

constexpr std::array kTypes = {at::kFloat, at::kDouble, at::kBFloat16, at::kInt, at::kLong, at::kByte};

/// One round of splitmix64: spreads every bit of `value` over the hash.
uint64_t mix(uint64_t hash, uint64_t value) {
  uint64_t x = hash + 0x9e3779b97f4a7c15ULL + value;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

std::vector<int64_t> scaled_rows(const at::Tensor& tensor, int64_t rows) {
  std::vector<int64_t> shape = tensor.sizes().vec();
  shape[0] = rows;
  return shape;
}

}  // namespace

struct Communicator::Call {
  Collective collective;
  std::optional<Purpose> purpose = std::nullopt;
  at::Tensor tensor = {};  // undefined for barrier and split
  int64_t argument = 0;    // reduction or root

  Transfer transfer() const {
    return {collective, tensor.numel(), static_cast<int64_t>(tensor.element_size()), static_cast<int>(argument)};
  }

  struct Field {
    const char* name;
    int64_t value;
  };
  std::array<Field, 6> fields(int64_t sequence) const {
    return {{{"operation", static_cast<int64_t>(collective)},
             {"type", tensor.defined() ? static_cast<int64_t>(tensor.scalar_type()) : -1},
             {"number of elements", tensor.defined() ? tensor.numel() : -1},
             {"reduction or root", argument},
             {"purpose", purpose ? static_cast<int64_t>(*purpose) : -1},
             {"sequence number", sequence}}};
  }

  int64_t hash(int64_t sequence) const {
    uint64_t result = 0;
    for (const Field& field : fields(sequence)) result = mix(result, static_cast<uint64_t>(field.value));
    return static_cast<int64_t>(result);
  }

  std::string text(int64_t sequence) const {
    std::ostringstream out;
    out << name(collective) << " number " << sequence;
    if (tensor.defined()) out << " of " << tensor.numel() << " " << tensor.scalar_type() << " elements";
    if (purpose) out << " for " << name(*purpose);
    return out.str();
  }
};

void Communicator::all_reduce(const at::Tensor& tensor, ReduceOp op, Purpose purpose) {
  require_tensor(Collective::all_reduce, tensor);
  require_reducible(Collective::all_reduce, tensor, op);
  if (size() == 1) return;
  run({Collective::all_reduce, purpose, tensor, static_cast<int64_t>(op)}, [&] { do_all_reduce(tensor, op); });
}

at::Tensor Communicator::all_gather(const at::Tensor& input, Purpose purpose) {
  require_tensor(Collective::all_gather, input);
  if (input.dim() == 0) refuse(Collective::all_gather, "the tensor has no dim 0 to concatenate along");
  if (size() == 1) return input;
  at::Tensor output = at::empty(scaled_rows(input, input.size(0) * size()), input.options());
  run({Collective::all_gather, purpose, input}, [&] { do_all_gather(output, input); });
  return output;
}

void Communicator::all_gather_into(const at::Tensor& output, const at::Tensor& input, Purpose purpose) {
  require_tensor(Collective::all_gather, input);
  require_tensor(Collective::all_gather, output);
  if (output.numel() != size() * input.numel() || output.scalar_type() != input.scalar_type()) {
    refuse(Collective::all_gather, "the output has not the type, or the room, for the inputs of all ranks");
  }
  if (size() == 1) {
    at::Tensor only = output;
    only.copy_(input.view_as(output));
    return;
  }
  run({Collective::all_gather, purpose, input}, [&] { do_all_gather(output, input); });
}

at::Tensor Communicator::reduce_scatter(const at::Tensor& input, ReduceOp op, Purpose purpose) {
  require_tensor(Collective::reduce_scatter, input);
  require_reducible(Collective::reduce_scatter, input, op);
  if (input.dim() == 0 || input.size(0) % size() != 0) {
    std::ostringstream reason;
    reason << "dim 0 of the tensor (sizes " << input.sizes() << ") does not divide by the number of ranks";
    refuse(Collective::reduce_scatter, reason.str());
  }
  if (size() == 1) return input;
  at::Tensor output = at::empty(scaled_rows(input, input.size(0) / size()), input.options());
  run({Collective::reduce_scatter, purpose, input, static_cast<int64_t>(op)},
      [&] { do_reduce_scatter(output, input, op); });
  return output;
}

void Communicator::broadcast(const at::Tensor& tensor, int root, Purpose purpose) {
  require_tensor(Collective::broadcast, tensor);
  if (root < 0 || root >= size()) {
    refuse(Collective::broadcast,
           "root " + std::to_string(root) + " is not a rank from 0 to " + std::to_string(size() - 1));
  }
  if (size() == 1) return;
  run({Collective::broadcast, purpose, tensor, root}, [&] { do_broadcast(tensor, root); });
}

void Communicator::barrier() {
  if (size() == 1) return;
  begin({Collective::barrier});
  do_barrier();
}

std::unique_ptr<Communicator> Communicator::split(int color, const std::string& axis) {
  if (color < 0) refuse(Collective::split, "the color " + std::to_string(color) + " is negative");
  if (size() > 1) begin({Collective::split});
  std::unique_ptr<Communicator> group = do_split(color, axis);
  group->set_cross_check(cross_check_);
  return group;
}

template <class Transfer>
void Communicator::run(const Call& call, Transfer transfer) {
  using Clock = std::chrono::steady_clock;
  const at::NoGradGuard no_grad;
  begin(call);
  if (ledger_.timing()) do_synchronize();
  const Clock::time_point start = Clock::now();
  if (call.tensor.numel() > 0) transfer();
  if (ledger_.timing()) do_synchronize();
  const bool timed = device_.is_cpu() || ledger_.timing();
  const double seconds = timed ? std::chrono::duration<double>(Clock::now() - start).count() : 0;
  Traffic traffic = ring_traffic(call.transfer(), ring_);
  traffic.seconds = seconds;
  ledger_.record(*call.purpose, traffic);
}

void Communicator::begin(const Call& call) {
  ++sequence_;
  if (!cross_check_) return;
  const auto [low, high] = do_min_max(call.hash(sequence_));
  if (low == high) return;
  throw DisagreeError("The ranks of " + axis_ + " call different collectives; they differ in " +
                      differing_fields(call) + ". " + place() + " calls " + call.text(sequence_) +
                      ". This is a defect of the program: keep the messages of all ranks and report it.");
}

std::string Communicator::differing_fields(const Call& call) {
  std::string result;
  for (const Call::Field& field : call.fields(sequence_)) {
    const auto [low, high] = do_min_max(field.value);
    if (low != high) result += (result.empty() ? "" : ", ") + std::string(field.name);
  }
  return result;
}

void Communicator::require_tensor(Collective collective, const at::Tensor& tensor) const {
  if (!tensor.defined()) refuse(collective, "the tensor is undefined");
  std::ostringstream reason;
  const bool same_index = device_.is_cpu() || tensor.device().index() == device_.index();
  if (tensor.device().type() != device_.type() || !same_index) {
    reason << "the tensor is on " << tensor.device() << ", the group's device is " << device_;
    refuse(collective, reason.str());
  }
  if (std::find(kTypes.begin(), kTypes.end(), tensor.scalar_type()) == kTypes.end()) {
    reason << "the tensor is of type " << tensor.scalar_type() << "; allowed are";
    for (const at::ScalarType type : kTypes) reason << " " << type;
    refuse(collective, reason.str());
  }
  if (tensor.layout() != at::kStrided || !tensor.is_contiguous()) {
    reason << "the tensor (sizes " << tensor.sizes() << ") is not contiguous; pass tensor.contiguous()";
    refuse(collective, reason.str());
  }
}

void Communicator::require_reducible(Collective collective, const at::Tensor& tensor, ReduceOp op) const {
  if (tensor.scalar_type() == at::kByte && op == ReduceOp::sum) {
    refuse(collective, "a sum of Byte elements would overflow; allowed are max and min");
  }
}

void Communicator::refuse(Collective collective, const std::string& reason) const {
  throw InternalError(std::string(name(collective)) + " over " + axis_ + ": " + place() +
                      " passed a wrong argument: " + reason + ".");
}

std::string Communicator::place() const { return "Rank " + std::to_string(rank()) + " of " + std::to_string(size()); }

}  // namespace corank
