#include "trainer/weights/residency.h"

#include <algorithm>
#include <set>

#include "tests/support.h"

// Where the bytes of frozen weights are changes no number, and the seam for it keeps its word.
namespace corank::test {
namespace {

struct Ask {
  int64_t order;
  Pass pass;
};

/// Keeps weights as copies of which nobody else holds the memory, and hands out copies of these: what reads a weight in
/// another way than through the seam, or holds on to it, is found.
class Elsewhere : public Residency {
 public:
  std::unique_ptr<StoredBytes> keep(int64_t order, std::vector<at::Tensor> tensors) override;
  std::unique_ptr<StoredBytes> keep_trained(int64_t order, const at::Tensor& values, at::IntArrayRef shape) override {
    return keep(order, {values.view(shape)});
  }
  at::Tensor shared_room(at::IntArrayRef, const at::TensorOptions&) override { return {}; }

  at::Tensor hand_out(const at::Tensor& kept, const Ask& ask) {
    at::Tensor copy = kept.clone();
    handed_out.push_back({ask.order, copy.storage().getWeakStorageImpl()});
    return copy;
  }
  /// The most numbers of which memory was alive at once.
  size_t alive() const {
    std::set<int64_t> orders;
    for (const auto& [order, storage] : handed_out) {
      c10::weak_intrusive_ptr<c10::StorageImpl> weak(storage);
      if (!weak.expired()) orders.insert(order);
    }
    return orders.size();
  }

  std::vector<Ask> asks;
  std::vector<std::pair<int64_t, c10::weak_intrusive_ptr<c10::StorageImpl>>> handed_out;
  size_t most_alive = 0;
};

class BytesElsewhere : public StoredBytes {
 public:
  BytesElsewhere(Elsewhere& owner, int64_t order, const std::vector<at::Tensor>& tensors)
      : owner_(owner), order_(order) {
    for (const at::Tensor& tensor : tensors) kept_.push_back(tensor.defined() ? tensor.clone() : at::Tensor());
  }
  std::vector<at::Tensor> on_device(Pass pass) const override {
    owner_.asks.push_back({order_, pass});
    std::vector<at::Tensor> copies;
    for (const at::Tensor& tensor : kept_) {
      copies.push_back(tensor.defined() ? owner_.hand_out(tensor, owner_.asks.back()) : at::Tensor());
    }
    owner_.most_alive = std::max(owner_.most_alive, owner_.alive());
    return copies;
  }
  int64_t device_bytes() const override { return 0; }

 private:
  Elsewhere& owner_;
  int64_t order_;
  std::vector<at::Tensor> kept_;
};

std::unique_ptr<StoredBytes> Elsewhere::keep(int64_t order, std::vector<at::Tensor> tensors) {
  return std::make_unique<BytesElsewhere>(*this, order, tensors);
}

ModelOptions tiny_model(const std::string& format, std::shared_ptr<Residency> residency) {
  ModelOptions options;
  options.shape = "tiny-llama";
  options.dtype = at::kFloat;
  options.quantization = format;
  options.max_positions = 64;
  options.residency = std::move(residency);
  return options;
}

struct Trained {
  std::vector<double> losses;
  at::Tensor masters;
};

Trained train(const std::string& method, const std::string& format, const std::shared_ptr<Residency>& residency) {
  AdapterConfig adapter;
  adapter.method = method;
  TrainingRun run(nullptr, 1, tiny_model(format, residency), adapter);
  const TokenFile data(repository("configs/tiny/train.h5"));
  Loader batches(data, {{64, true, true, 7}, 2, 1, 0, 1});
  Trained result;
  for (int64_t step = 1; step <= 3; ++step) result.losses.push_back(run.step(batches.next(), step, 1e-2).loss);
  result.masters = run.store.masters().clone();
  return result;
}

TEST(Residency, WeightsElsewhereTrainTheSameAdapterToTheBit) {
  for (const std::string& format : format_names()) {
    for (const char* method : {"lora", "dora", "mora", "adalora"}) {
      const Trained here = train(method, format, resident());
      const Trained there = train(method, format, std::make_shared<Elsewhere>());
      EXPECT_EQ(here.losses, there.losses) << method << " " << format;
      EXPECT_TRUE(at::equal(here.masters, there.masters)) << method << " " << format;
    }
  }
}

/// Two slots are enough: what a product has used, and what the next one is using.
TEST(Residency, NoWeightIsHeldAfterItsProduct) {
  for (const std::string& format : format_names()) {
    const auto elsewhere = std::make_shared<Elsewhere>();
    train("lora", format, elsewhere);
    EXPECT_GE(elsewhere->asks.size(), 100U);
    EXPECT_LE(elsewhere->most_alive, 2U) << format;
  }
}

TEST(Residency, ForwardAsksInOrderAndBackwardInReverse) {
  const auto elsewhere = std::make_shared<Elsewhere>();
  AdapterConfig adapter;
  TrainingRun run(nullptr, 1, tiny_model("none", elsewhere), adapter);
  const TokenFile data(repository("configs/tiny/train.h5"));
  Loader batches(data, {{64, true, true, 7}, 1, 1, 0, 1});
  elsewhere->asks.clear();
  run.step(batches.next(), 1, 1e-2);
  std::vector<int64_t> forward, backward;
  for (const Ask& ask : elsewhere->asks) (ask.pass == Pass::forward ? forward : backward).push_back(ask.order);
  EXPECT_TRUE(std::is_sorted(forward.begin(), forward.end()));
  EXPECT_TRUE(std::is_sorted(backward.rbegin(), backward.rend()));
  EXPECT_EQ(forward.size(), run.model->linears().size());
  EXPECT_EQ(backward.size(), forward.size() - 3) << "nothing below the first q, k and v trains";
  EXPECT_EQ(forward.front(), 0);
  EXPECT_EQ(forward.back(), 4 * run.model->num_layers() - 1) << "q, k, v share a number, and gate and up";
}

/// Rows of `linears` follow each other in one matrix.
bool lie_together(const std::vector<const AdaptedLinear*>& linears) {
  const at::Tensor first = linears.front()->weight().dense_OI();
  int64_t offset = first.storage_offset();
  for (const AdaptedLinear* linear : linears) {
    const at::Tensor w_OI = linear->weight().dense_OI();
    if (!w_OI.is_alias_of(first) || w_OI.storage_offset() != offset) return false;
    offset += w_OI.numel();
  }
  return true;
}

TEST(SharedRooms, WeightsOfOneInputAreRowsOfOneMatrixUnderTheirNames) {
  AdapterConfig adapter;
  TrainingRun run(nullptr, 1, tiny_model("none", resident()), adapter);
  const std::vector<AdaptedLinear*> all = run.model->linears();
  const std::vector<const AdaptedLinear*> qkv{all[0], all[1], all[2]}, gate_up{all[4], all[5]};
  EXPECT_TRUE(qkv[1]->name().ends_with("k_proj") && gate_up[1]->name().ends_with("up_proj"));
  EXPECT_TRUE(lie_together(qkv) && lie_together(gate_up));
  EXPECT_FALSE(lie_together({all[2], all[3]})) << "v and o read different inputs";
  const at::Tensor k_OI = all[1]->weight().dense_OI().clone(), q_OI = all[0]->weight().dense_OI().clone();
  all[1]->rebuild([](const at::Tensor& w_OI) { return w_OI * 2; });
  EXPECT_TRUE(at::equal(all[1]->weight().dense_OI(), k_OI * 2) && at::equal(all[0]->weight().dense_OI(), q_OI));
  all[1]->rebuild();
  all[1]->merge(k_OI * 3);
  EXPECT_TRUE(at::equal(all[1]->weight().dense_OI(), k_OI * 3) && at::equal(all[0]->weight().dense_OI(), q_OI));
  EXPECT_TRUE(lie_together(qkv));
}

}  // namespace
}  // namespace corank::test
