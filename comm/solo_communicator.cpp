#include <vector>

#include "comm/backends.h"
#include "configs/error.h"

namespace corank {
namespace {

/// A group without peers. The base class answers every collective of a group of one; a larger one has none to ask.
class SoloCommunicator final : public Communicator {
 public:
  SoloCommunicator(int size, const std::string& axis, at::Device device, Ledger& ledger)
      : Communicator(Ring(std::vector<int>(static_cast<size_t>(size)), 0), axis, device, ledger) {}

 protected:
  void do_all_reduce(const at::Tensor&, ReduceOp) override { unreachable(); }
  void do_all_gather(const at::Tensor&, const at::Tensor&) override { unreachable(); }
  void do_reduce_scatter(const at::Tensor&, const at::Tensor&, ReduceOp) override { unreachable(); }
  void do_broadcast(const at::Tensor&, int) override { unreachable(); }
  void do_barrier() override { unreachable(); }
  std::pair<int64_t, int64_t> do_min_max(int64_t) override { unreachable(); }
  std::unique_ptr<Communicator> do_split(int, const std::string& axis) override {
    return std::make_unique<SoloCommunicator>(size(), axis, device(), ledger());
  }

 private:
  [[noreturn]] static void unreachable() { throw InternalError("A collective reached a group that has no peers."); }
};

}  // namespace

std::unique_ptr<Communicator> make_solo_communicator(at::Device device, Ledger& ledger) {
  return std::make_unique<SoloCommunicator>(1, "world", device, ledger);
}

std::unique_ptr<Communicator> make_outline_communicator(int size, Ledger& ledger) {
  return std::make_unique<SoloCommunicator>(size, "tp", at::kCPU, ledger);
}

}  // namespace corank
