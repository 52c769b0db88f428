#include "trainer/run/base_walk.h"

#include <map>

#include "trainer/weights/sharded.h"

namespace corank {
namespace {

bool is_feed_forward(const LinearSize& linear) {
  return linear.role == LinearRole::feed_forward_in || linear.role == LinearRole::feed_forward_out;
}

/// The numbers of weights (StoredSize) in the order in which a micro-batch asks for them.
class BaseWalk {
 public:
  explicit BaseWalk(const std::vector<StoredSize>& stored) : stored_(stored) {}

  void forward(const HalfLayer& half) {
    ask(half.in.front());
    ask(half.out);
  }
  void backward(const HalfLayer& half) {
    if (half.out_gradient) ask(half.out);
    if (half.in_gradient) ask(half.in.front());
  }
  const std::vector<int64_t>& orders() const { return orders_; }

 private:
  void ask(size_t linear) { orders_.push_back(stored_[linear].order); }

  const std::vector<StoredSize>& stored_;
  std::vector<int64_t> orders_;
};

std::vector<int64_t> walk_of_micro_batch(const std::vector<StoredSize>& stored, const std::vector<HalfLayer>& halves,
                                         Checkpointing checkpointing) {
  BaseWalk walk(stored);
  for (const HalfLayer& half : halves) walk.forward(half);
  for (size_t end = halves.size(); end > 0; --end) {
    const HalfLayer& half = halves[end - 1];
    const bool layer_again = checkpointing == Checkpointing::full && end % 2 == 0;  // a layer's second half
    if (layer_again) walk.forward(halves[end - 2]);
    if (layer_again || (half.again && checkpointing == Checkpointing::mlp)) walk.forward(half);
    walk.backward(half);
  }
  return walk.orders();
}

}  // namespace

std::vector<HalfLayer> half_layers(const TrafficShape& shape, const std::set<std::string>& trained, bool below_trains,
                                   Checkpointing checkpointing) {
  std::vector<HalfLayer> halves;
  HalfLayer half;
  bool needs_gradient = below_trains;  // the half's input: something below it trains, or is run again
  bool half_trains = false;
  for (size_t i = 0; i < shape.linears.size(); ++i) {
    const LinearSize& linear = shape.linears[i];
    if (!linear.row) {
      half.in.push_back(i);
      half_trains = half_trains || trained.count(linear.name);
      continue;
    }
    half.out = i;
    half.in_gradient = needs_gradient;
    half.out_gradient = needs_gradient || half_trains;
    half.again =
        checkpointing == Checkpointing::full || (checkpointing == Checkpointing::mlp && is_feed_forward(linear));
    needs_gradient = half.out_gradient || trained.count(linear.name) || (half.again && is_feed_forward(linear));
    halves.push_back(std::exchange(half, {}));
    half_trains = false;
  }
  return halves;
}

std::vector<int64_t> base_gathers(const std::vector<StoredSize>& stored, const std::vector<HalfLayer>& halves,
                                  Checkpointing checkpointing) {
  std::map<int64_t, std::vector<int64_t>> bytes;  // of the weights of one number
  for (const StoredSize& weight : stored) bytes[weight.order].push_back(weight.gather_bytes);
  Slots slots;
  std::vector<int64_t> gathers;
  for (const int64_t order : walk_of_micro_batch(stored, halves, checkpointing)) {
    if (!slots.has(order)) gathers.insert(gathers.end(), bytes.at(order).begin(), bytes.at(order).end());
    slots.ask(order);
  }
  return gathers;
}

}  // namespace corank
