#include "comm/backends.h"
#include "configs/error.h"

namespace corank {
namespace {

/// The base class answers every collective of a group of one; what reaches the backend is a defect of the base class.
class SoloCommunicator final : public Communicator {
 public:
  SoloCommunicator(const std::string& axis, at::Device device, Ledger& ledger)
      : Communicator(0, 1, axis, device, ledger) {}

 protected:
  void do_all_reduce(const at::Tensor&, ReduceOp) override { unreachable(); }
  void do_all_gather(const at::Tensor&, const at::Tensor&) override { unreachable(); }
  void do_reduce_scatter(const at::Tensor&, const at::Tensor&, ReduceOp) override { unreachable(); }
  void do_broadcast(const at::Tensor&, int) override { unreachable(); }
  void do_barrier() override { unreachable(); }
  std::pair<int64_t, int64_t> do_min_max(int64_t) override { unreachable(); }
  std::unique_ptr<Communicator> do_split(int, const std::string& axis) override {
    return std::make_unique<SoloCommunicator>(axis, device(), ledger());
  }

 private:
  [[noreturn]] static void unreachable() { throw InternalError("A collective of a group of one reached its backend."); }
};

}  // namespace

std::unique_ptr<Communicator> make_solo_communicator(at::Device device, Ledger& ledger) {
  return std::make_unique<SoloCommunicator>("world", device, ledger);
}

}  // namespace corank
