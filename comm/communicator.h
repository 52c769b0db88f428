#pragma once
#include <ATen/ATen.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "comm/ledger.h"

namespace corank {

enum class ReduceOp { sum, max, min };

/// A fixed set of ranks that call the same collectives in the same order. Every call names its purpose; its bytes are
/// counted in the Ledger. Argument checks are made once, here; a backend only moves bytes.
///
/// Tensors: contiguous, on the backend's device (CPU for mpi and solo-on-CPU, CUDA for nccl), same dtype and number of
/// elements on all ranks. Types: float32, float64, bfloat16 (reduced pairwise in float32, rounded to bfloat16), int32,
/// int64, uint8 (uint8: max and min only for reductions).
/// Order and completion: CPU collectives are complete on return; CUDA collectives are enqueued on the caller's current
/// stream, so they run after what was enqueued before and before what is enqueued after, and the host does not wait.
/// All ranks receive the same bits from all_reduce. What max and min give where a value is NaN is unspecified.
/// Gradients do not flow through a collective. A group of one returns its input and counts nothing.
/// Errors: InternalError for a wrong argument (before anything is sent); CommError when a peer or the network fails;
/// DisagreeError (cross-check on) when the ranks call different collectives.
class Communicator {
 public:
  virtual ~Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int rank() const { return ring_.rank(); }
  int size() const { return ring_.size(); }
  /// The order in which its ranks pass bytes on, and which of them share a host.
  const Ring& ring() const { return ring_; }
  /// Name of the group in messages: "world", "dp", "tp".
  const std::string& axis() const { return axis_; }
  at::Device device() const { return device_; }

  /// Collective. Reduces in place.
  void all_reduce(const at::Tensor& tensor, ReduceOp op, Purpose purpose);
  /// Collective. Concatenates every rank's `input` along dim 0 in rank order into a new tensor.
  at::Tensor all_gather(const at::Tensor& input, Purpose purpose);
  /// The same into `output`, which has size() times the elements of `input`.
  void all_gather_into(const at::Tensor& output, const at::Tensor& input, Purpose purpose);
  /// Collective. Reduces over ranks and keeps this rank's block of dim 0 (which must divide by size()), in a new
  /// tensor.
  at::Tensor reduce_scatter(const at::Tensor& input, ReduceOp op, Purpose purpose);
  /// Collective. Every rank receives `root`'s tensor in place.
  void broadcast(const at::Tensor& tensor, int root, Purpose purpose);
  /// Collective. Returns when every rank has called it; host-side on every backend.
  void barrier();

  /// Collective. Ranks of equal `color` (0 or more) form a group of their own, ordered by rank. It inherits the
  /// cross-check.
  std::unique_ptr<Communicator> split(int color, const std::string& axis);

  /// While on, each collective first compares operation, dtype, number of elements, reduction or root, purpose and
  /// sequence number over all ranks and throws DisagreeError on every rank if they differ. Set it on all ranks alike.
  /// For tests and debugging; counts no bytes.
  void set_cross_check(bool on) { cross_check_ = on; }

 protected:
  Communicator(Ring ring, std::string axis, at::Device device, Ledger& ledger)
      : ring_(std::move(ring)), axis_(std::move(axis)), device_(device), ledger_(ledger) {}

  // A backend sees checked arguments and tensors with elements only and, but for do_split, groups of several ranks
  // only.
  virtual void do_all_reduce(const at::Tensor& tensor, ReduceOp op) = 0;
  virtual void do_all_gather(const at::Tensor& output, const at::Tensor& input) = 0;
  virtual void do_reduce_scatter(const at::Tensor& output, const at::Tensor& input, ReduceOp op) = 0;
  virtual void do_broadcast(const at::Tensor& tensor, int root) = 0;
  virtual void do_barrier() = 0;
  virtual std::unique_ptr<Communicator> do_split(int color, const std::string& axis) = 0;
  /// The smallest and the largest of `value` over the ranks, through the host (cross-check).
  virtual std::pair<int64_t, int64_t> do_min_max(int64_t value) = 0;
  /// Waits for what was enqueued (timing only).
  virtual void do_synchronize() {}

  Ledger& ledger() const { return ledger_; }

 private:
  struct Call;

  template <class Transfer>
  void run(const Call& call, Transfer transfer);
  /// Counts the call and, with the cross-check on, compares it over the ranks.
  void begin(const Call& call);
  std::string differing_fields(const Call& call);
  void require_tensor(Collective collective, const at::Tensor& tensor) const;
  void require_reducible(Collective collective, const at::Tensor& tensor, ReduceOp op) const;
  [[noreturn]] void refuse(Collective collective, const std::string& reason) const;
  std::string place() const;

  Ring ring_;
  std::string axis_;
  at::Device device_;
  Ledger& ledger_;
  bool cross_check_ = false;
  int64_t sequence_ = 0;
};

}  // namespace corank
