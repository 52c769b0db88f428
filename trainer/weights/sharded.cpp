#include "trainer/weights/sharded.h"

#include <torch/csrc/autograd/engine.h>

#include <algorithm>
#include <deque>
#include <map>
#include <utility>

#include "trainer/ops/side_stream.h"

namespace corank {

void Walk::begin() {
  const bool known_already =
      current_.size() <= known_.size() && std::equal(current_.begin(), current_.end(), known_.begin());
  if (!known_already) known_ = current_;
  current_.clear();
}

void Walk::visit(int64_t order) {
  if (current_.empty() || current_.back() != order) current_.push_back(order);
}

std::vector<int64_t> Walk::next(size_t count) const {
  std::vector<int64_t> orders;
  if (current_.size() > known_.size() || !std::equal(current_.begin(), current_.end(), known_.begin())) return orders;
  for (size_t i = current_.size(); i < known_.size() && orders.size() < count; ++i) {
    const bool there = known_[i] == current_.back() || std::count(orders.begin(), orders.end(), known_[i]) > 0;
    if (!there) orders.push_back(known_[i]);
  }
  return orders;
}

bool Slots::has(int64_t order) const { return std::count(held_.begin(), held_.end(), order) > 0; }

std::vector<int64_t> Slots::ask(int64_t order, const std::vector<int64_t>& next) {
  std::vector<int64_t> held{order}, gone;
  held.insert(held.end(), next.begin(), next.end());
  for (const int64_t one : held_) {
    if (std::count(held.begin(), held.end(), one) > 0) continue;
    (held.size() < kSlots ? held : gone).push_back(one);
  }
  held_ = std::move(held);
  return gone;
}

namespace {

constexpr int64_t kPieceAlignment = 256;  // bytes; what kernels ask for, and CUDA's own allocations have

int64_t align(int64_t bytes, int64_t to) { return (bytes + to - 1) / to * to; }

}  // namespace

int64_t share_of(int64_t bytes, int64_t ranks) { return align(bytes, ranks * kPieceAlignment) / ranks; }

namespace {

class ShardedBytes;

/// Gradients of shared weights that are on their way to the ranks that own their parts.
class GradientsUnderWay {
 public:
  explicit GradientsUnderWay(ops::SideStream& side) : side_(side) {}
  /// `gradient` is read until `ticket` is waited for.
  void add(at::Tensor gradient, ops::SideStream::Ticket ticket);

 private:
  struct One {
    at::Tensor gradient;
    ops::SideStream::Ticket ticket;
  };
  static constexpr size_t kMost = 2;

  void wait_for_first();

  ops::SideStream& side_;
  std::deque<One> all_;
  bool ends_with_pass_ = false;
};

class Sharded : public Residency, public std::enable_shared_from_this<Sharded> {
 public:
  explicit Sharded(std::unique_ptr<Communicator> group) : group_(std::move(group)), side_(group_->device()) {}

  std::unique_ptr<StoredBytes> keep(int64_t order, std::vector<at::Tensor> tensors) override;
  std::unique_ptr<StoredBytes> keep_trained(int64_t order, const at::Tensor& values, at::IntArrayRef shape) override;
  std::shared_ptr<TrainedShare> trained_share(at::ScalarType dtype) override;
  at::Tensor shared_room(at::IntArrayRef, const at::TensorOptions&) override { return {}; }
  void begin_forward() override;
  /// Collective. Sums `flat` over the ranks and adds this rank's part to `gradient`.
  void scatter_gradient(const at::Tensor& flat, const at::Tensor& gradient);

  /// Collective. All bytes of a weight, for the caller's stream.
  at::Tensor whole(const ShardedBytes& weight, Pass pass);
  void forget(const ShardedBytes& weight);
  Communicator& group() const { return *group_; }

 private:
  /// Weights of one input that are whole on the device, or on their way.
  struct Group {
    std::map<const ShardedBytes*, at::Tensor> flat;
    ops::SideStream::Ticket ticket;
  };

  std::unique_ptr<StoredBytes> keep(std::unique_ptr<ShardedBytes> bytes);
  void fetch(const ShardedBytes& weight, Group& group);
  void fetch_all(int64_t order);

  std::unique_ptr<Communicator> group_;
  ops::SideStream side_;
  GradientsUnderWay gradients_{side_};
  std::map<int64_t, std::vector<const ShardedBytes*>> weights_;  ///< by order
  std::map<int64_t, Group> here_;
  Slots slots_;
  Walk walk_;
};

/// One weight: all its tensors one after the other as bytes, of which this rank keeps its part.
class ShardedBytes : public StoredBytes {
 public:
  ShardedBytes(Sharded& owner, int64_t order, const std::vector<at::Tensor>& tensors) : owner_(owner), order_(order) {
    int64_t end = 0;
    for (const at::Tensor& tensor : tensors) {
      pieces_.push_back({tensor.defined() ? std::optional(tensor.options()) : std::nullopt,
                         tensor.defined() ? tensor.sizes().vec() : std::vector<int64_t>(), end});
      if (tensor.defined()) end = align(end + static_cast<int64_t>(tensor.nbytes()), kPieceAlignment);
    }
    const int64_t ranks = owner.group().size(), share = share_of(end, ranks);
    const at::Tensor flat = at::zeros({share * ranks}, tensors.front().options().dtype(at::kByte));
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (tensors[i].defined()) view(flat, pieces_[i]).copy_(tensors[i]);
    }
    part_ = flat.narrow(0, owner.group().rank() * share, share).clone();
  }
  /// A weight that trains, of which `part` holds this rank's elements.
  ShardedBytes(Sharded& owner, int64_t order, const at::Tensor& part, at::IntArrayRef shape)
      : owner_(owner), order_(order), pieces_{{part.options(), shape.vec(), 0}}, part_(part.view(at::kByte)) {}
  ~ShardedBytes() override { owner_.forget(*this); }

  std::vector<at::Tensor> on_device(Pass pass) const override {
    const at::Tensor flat = owner_.whole(*this, pass);
    std::vector<at::Tensor> tensors;
    for (const Piece& piece : pieces_) tensors.push_back(piece.options ? view(flat, piece) : at::Tensor());
    return tensors;
  }
  int64_t device_bytes() const override { return part_.numel(); }
  int64_t gather_bytes() const override { return part_.numel(); }

  int64_t order() const { return order_; }
  const at::Tensor& part() const { return part_; }

 private:
  struct Piece {
    std::optional<at::TensorOptions> options;
    std::vector<int64_t> sizes;
    int64_t begin;
  };

  static at::Tensor view(const at::Tensor& flat, const Piece& piece) {
    const auto type = c10::typeMetaToScalarType(piece.options->dtype());
    const int64_t bytes = c10::multiply_integers(piece.sizes) * static_cast<int64_t>(c10::elementSize(type));
    return flat.narrow(0, piece.begin, bytes).view(type).view(piece.sizes);
  }

  Sharded& owner_;
  int64_t order_;
  std::vector<Piece> pieces_;
  at::Tensor part_;
};

/// Weights that train, shared like those that do not.
class ShardedTraining : public TrainedShare {
 public:
  ShardedTraining(std::shared_ptr<Sharded> owner, int64_t element_bytes)
      : owner_(std::move(owner)), element_bytes_(element_bytes) {}

  int64_t part_elements(int64_t elements) const override {
    return share_of(elements * element_bytes_, ranks()) / element_bytes_;
  }
  at::Tensor part_of(const at::Tensor& block) const override {
    const int64_t part = part_elements(block.numel());
    return padded(block).narrow(0, owner_->group().rank() * part, part).clone();
  }
  at::Tensor whole(const at::Tensor& part, at::IntArrayRef shape) const override {
    const at::Tensor flat = owner_->group().all_gather(part.contiguous(), Purpose::checkpoint);
    return flat.narrow(0, 0, c10::multiply_integers(shape)).view(shape);
  }
  void add_gradient(const at::Tensor& leaf, at::Tensor gradient) override {
    owner_->scatter_gradient(padded(gradient), leaf.grad());
  }

 private:
  int64_t ranks() const { return owner_->group().size(); }
  at::Tensor padded(const at::Tensor& block) const {
    const int64_t missing = ranks() * part_elements(block.numel()) - block.numel();
    const at::Tensor flat = block.contiguous().view({-1});
    return missing == 0 ? flat : at::constant_pad_nd(flat, {0, missing});
  }

  std::shared_ptr<Sharded> owner_;
  int64_t element_bytes_;  ///< in the dtype of products
};

std::unique_ptr<StoredBytes> Sharded::keep(std::unique_ptr<ShardedBytes> bytes) {
  weights_[bytes->order()].push_back(bytes.get());
  return bytes;
}

std::unique_ptr<StoredBytes> Sharded::keep(int64_t order, std::vector<at::Tensor> tensors) {
  return keep(std::make_unique<ShardedBytes>(*this, order, tensors));
}

std::unique_ptr<StoredBytes> Sharded::keep_trained(int64_t order, const at::Tensor& values, at::IntArrayRef shape) {
  return keep(std::make_unique<ShardedBytes>(*this, order, values, shape));
}

std::shared_ptr<TrainedShare> Sharded::trained_share(at::ScalarType dtype) {
  return std::make_shared<ShardedTraining>(shared_from_this(), static_cast<int64_t>(c10::elementSize(dtype)));
}

void Sharded::scatter_gradient(const at::Tensor& flat, const at::Tensor& gradient) {
  gradients_.add(flat, side_.run([&] {
    at::Tensor sum = gradient;
    sum.add_(group_->reduce_scatter(flat, ReduceOp::sum, Purpose::weight_gradients));
  }));
}

void GradientsUnderWay::add(at::Tensor gradient, ops::SideStream::Ticket ticket) {
  all_.push_back({std::move(gradient), std::move(ticket)});
  if (all_.size() > kMost) wait_for_first();
  if (std::exchange(ends_with_pass_, true)) return;
  torch::autograd::Engine::get_default_engine().queue_callback([this] {
    while (!all_.empty()) wait_for_first();
    ends_with_pass_ = false;
  });
}

void GradientsUnderWay::wait_for_first() {
  side_.wait(all_.front().ticket);
  all_.pop_front();
}

/// What one pass fetches does not depend on what was there before it.
void Sharded::begin_forward() {
  here_.clear();
  slots_.clear();
  walk_.begin();
}

void Sharded::fetch(const ShardedBytes& weight, Group& group) {
  group.ticket = side_.run([&] { group.flat[&weight] = group_->all_gather(weight.part(), Purpose::base_gathers); });
}

void Sharded::fetch_all(int64_t order) {
  Group& group = here_[order];
  for (const ShardedBytes* weight : weights_.at(order)) {
    if (!group.flat.count(weight)) fetch(*weight, group);
  }
}

at::Tensor Sharded::whole(const ShardedBytes& weight, Pass pass) {
  if (pass == Pass::apart) {
    Group alone;
    fetch(weight, alone);
    side_.wait(alone.ticket);
    return alone.flat.at(&weight);
  }
  const int64_t order = weight.order();
  walk_.visit(order);
  const std::vector<int64_t> next = walk_.next(Slots::kSlots - 1);
  for (const int64_t gone : slots_.ask(order, next)) here_.erase(gone);
  fetch_all(order);
  for (const int64_t one : next) fetch_all(one);
  const Group& group = here_.at(order);
  side_.wait(group.ticket);
  return group.flat.at(&weight);
}

void Sharded::forget(const ShardedBytes& weight) {
  auto& same = weights_.at(weight.order());
  std::erase(same, &weight);
  const auto group = here_.find(weight.order());
  if (group == here_.end()) return;
  side_.wait(group->second.ticket);
  group->second.flat.erase(&weight);
}

}  // namespace

std::shared_ptr<Residency> sharded_over(std::unique_ptr<Communicator> group) {
  return std::make_shared<Sharded>(std::move(group));
}

}  // namespace corank
