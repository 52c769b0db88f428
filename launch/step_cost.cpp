#include "launch/step_cost.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "trainer/layers/cross_entropy.h"
#include "trainer/methods/targets.h"

namespace corank {
namespace {

constexpr int64_t kMasterBytes = 4;
constexpr int64_t kProductWorkspace = int64_t{32} << 20;  // cuBLAS takes it from the allocator on Hopper
constexpr size_t kGroupsOfLayer = 4;                      // one of each LinearRole

/// Linears that read one input, on one rank.
struct LinearGroup {
  int64_t in = 0, out = 0;  ///< features of this rank
  int64_t weights = 0;      ///< elements of this rank
  bool trains = false;
  int64_t update_kept = 0;  ///< elements a token that updates keep
  int64_t update_kept_once = 0;
  double forward_passes = 0, backward_passes = 0;  ///< elements a token that updates read and write
  int64_t state_bytes = 0;
};

bool has_head_norms(const TrafficShape& shape) {
  return std::any_of(shape.others.begin(), shape.others.end(), [](const TrafficShape::Other& other) {
    return other.role == WeightRole::norm && other.scope == GradientScope::everywhere;
  });
}

/// Whether a weight outside the blocks trains.
bool trains(const Outline& outline, const AdapterMethod& method, WeightRole role) {
  const auto& others = outline.shape.others;
  return method.trains_base() || std::any_of(others.begin(), others.end(), [&](const TrafficShape::Other& other) {
           return other.saved && other.role == role;
         });
}

bool tied_head(const Outline& outline) {
  const auto& others = outline.shape.others;
  return std::none_of(others.begin(), others.end(),
                      [](const TrafficShape::Other& other) { return other.role == WeightRole::head; });
}

/// Whether what follows the linear keeps its output as it is: v for attention, gate and up for their product. One
/// linear of several matrices is cut into copies; q and k are turned, or normed first.
bool output_is_kept(const std::vector<const LinearSize*>& together, size_t i, int64_t row_in, bool head_norms) {
  const LinearSize& linear = *together[i];
  if (linear.row) return false;
  if (linear.role == LinearRole::attention_in) {
    return together.size() > 1 && (head_norms || i + 1 == together.size());
  }
  return linear.out == row_in;
}

/// `row_in`: full input features of the row-parallel linear that follows.
LinearGroup group_of(const Outline& outline, const AdapterMethod& method, const std::set<std::string>& targets,
                     const std::vector<const LinearSize*>& together, int64_t row_in) {
  LinearGroup group;
  const int64_t tensor = outline.tensor;
  for (size_t i = 0; i < together.size(); ++i) {
    const LinearSize& linear = *together[i];
    const int64_t in = linear.row ? linear.in / tensor : linear.in, out = linear.row ? linear.out : linear.out / tensor;
    group.in = in;
    group.out += out;
    group.weights += linear.in * linear.out / tensor;
    if (method.trains_base()) group.trains = true;
    if (!targets.contains(linear.name)) continue;
    group.trains = true;
    const UpdateCost cost = method.update_cost(linear, outline.tensor);
    group.update_kept += cost.kept;
    group.update_kept_once += cost.kept_once;
    if (cost.keeps_output && !output_is_kept(together, i, row_in, has_head_norms(outline.shape)))
      group.update_kept += out;
    group.forward_passes +=
        cost.forward.input * static_cast<double>(in) + cost.forward.output * static_cast<double>(out);
    group.backward_passes +=
        cost.backward.input * static_cast<double>(in) + cost.backward.output * static_cast<double>(out);
    group.state_bytes += cost.state_bytes;
  }
  return group;
}

std::set<std::string> targets_of(const Outline& outline, const AdapterMethod& method) {
  if (method.trains_base()) return {};
  std::vector<std::string> names;
  for (const LinearSize& linear : outline.shape.linears) names.push_back(linear.name);
  const auto targets = select_targets(method.config(), names);
  return {targets.begin(), targets.end()};
}

/// The linears in the order of forward, kGroupsOfLayer groups a layer.
std::vector<LinearGroup> groups_of(const Outline& outline, const AdapterMethod& method) {
  const std::set<std::string> targets = targets_of(outline, method);
  const auto& linears = outline.shape.linears;
  std::vector<LinearGroup> groups;
  for (size_t begin = 0; begin < linears.size();) {
    std::vector<const LinearSize*> together;
    size_t end = begin;
    while (end < linears.size() && linears[end].role == linears[begin].role) together.push_back(&linears[end++]);
    const int64_t row_in = end < linears.size() ? linears[end].in : 0;
    groups.push_back(group_of(outline, method, targets, together, row_in));
    begin = end;
  }
  return groups;
}

/// Bytes a token that one layer keeps for backward.
struct LayerKept {
  int64_t outside = 0;       ///< by the norms and the attention half
  int64_t input = 0;         ///< of the feed-forward half
  int64_t feed_forward = 0;  ///< by that half itself

  int64_t all() const { return outside + input + feed_forward; }
};

/// Goes through the layers as forward does. Nothing is kept before the first that trains.
class KeptWalk {
 public:
  KeptWalk(const Outline& outline, const AdapterMethod& method, const StepShape& step)
      : head_dim_(outline.head_dim),
        element_(step.element_bytes),
        hidden_(outline.shape.hidden * element_),
        head_norms_(has_head_norms(outline.shape)),
        recomputes_(step.checkpointing != Checkpointing::none),
        flows_(trains(outline, method, WeightRole::embedding)) {}

  LayerKept layer(const LinearGroup* group) {
    const LinearGroup &qkv = group[0], &mixed = group[1], &in = group[2], &out = group[3];
    LayerKept kept;
    kept.outside = norm() + input(qkv) + (qkv.update_kept + mixed.update_kept) * element_;
    flows_ = flows_ || qkv.trains;
    if (flows_) kept.outside += attention(qkv, mixed);
    flows_ = flows_ || mixed.trains;
    kept.outside += norm();
    kept.input = input(in);
    flows_ = flows_ || in.trains;
    kept.feed_forward = (in.update_kept + out.update_kept + (flows_ ? in.out : 0)) * element_;
    if (out.trains) kept.feed_forward += out.in * element_;
    flows_ = flows_ || out.trains || recomputes_;
    return kept;
  }

  /// Its input and a float32.
  int64_t norm() const { return flows_ ? hidden_ + 4 : 0; }

 private:
  int64_t input(const LinearGroup& group) const { return group.trains ? hidden_ : 0; }
  /// q, k, v, the output and a float32 a head; what norms of heads keep.
  int64_t attention(const LinearGroup& qkv, const LinearGroup& mixed) const {
    const int64_t turned = qkv.out - (qkv.out - mixed.in) / 2;
    const int64_t normed = head_norms_ ? turned * element_ + turned / head_dim_ * 4 : 0;
    return (qkv.out + mixed.in) * element_ + mixed.in / head_dim_ * 4 + normed;
  }

  int64_t head_dim_, element_, hidden_;
  bool head_norms_, recomputes_, flows_;
};

/// Whether the frozen linears are stored in fewer bytes than they multiply with.
bool is_packed(const Outline& outline, const std::vector<LinearGroup>& groups, int64_t element_bytes) {
  int64_t weights = 0;
  for (const LinearGroup& group : groups) weights += group.weights;
  return outline.linear_bytes > 0 && outline.linear_bytes < element_bytes * weights;
}

int64_t local_vocabulary(const Outline& outline) { return (outline.shape.vocab + outline.tensor - 1) / outline.tensor; }

/// Made with the loss, float32, and kept until it is added.
int64_t head_gradient(const Outline& outline, const AdapterMethod& method) {
  const bool trained = trains(outline, method, tied_head(outline) ? WeightRole::embedding : WeightRole::head);
  return trained ? kMasterBytes * local_vocabulary(outline) * outline.shape.hidden : 0;
}

/// Bytes of one micro-batch: kept from forward for backward, and what recomputing one block brings back.
struct KeptBytes {
  int64_t always = 0, again = 0;
};

KeptBytes kept_bytes(const Outline& outline, const AdapterMethod& method, const std::vector<LinearGroup>& groups,
                     const StepShape& step) {
  const int64_t hidden = outline.shape.hidden * step.element_bytes;
  KeptBytes a_token;
  KeptWalk walk(outline, method, step);
  for (size_t i = 0; i < groups.size(); i += kGroupsOfLayer) {
    const LayerKept layer = walk.layer(&groups[i]);
    if (step.checkpointing == Checkpointing::none) {
      a_token.always += layer.all();
    } else if (step.checkpointing == Checkpointing::mlp) {
      a_token.always += layer.outside + hidden;
      a_token.again = std::max(a_token.again, layer.feed_forward);
    } else {
      a_token.always += i == 0 ? hidden : 2 * hidden;  // the residual stream and what is to be added to it
      a_token.again = std::max(a_token.again, layer.all());
    }
  }
  a_token.always += walk.norm();
  int64_t once = 0;
  if (step.checkpointing != Checkpointing::full) {
    for (const LinearGroup& group : groups) once += group.update_kept_once * step.element_bytes;
  }
  if (trains(outline, method, WeightRole::embedding)) a_token.always += 8 + 1;  // its rows, and whether they are here
  return {once + a_token.always * step.tokens() + hidden * step.targets + head_gradient(outline, method),
          a_token.again * step.tokens()};
}

int64_t logits_at_once(const Outline& outline, const StepShape& step) {
  return std::min(step.targets, rows_at_once(local_vocabulary(outline)));
}

/// While the loss is made: the last hidden states and their targets' rows, logits and their gradient, the head's.
int64_t loss_workspace(const Outline& outline, const AdapterMethod& method, const StepShape& step) {
  const int64_t e = step.element_bytes, hidden = outline.shape.hidden, vocab = local_vocabulary(outline);
  const int64_t rows = logits_at_once(outline, step), copy = e == kMasterBytes ? 0 : e;
  return (step.tokens() + step.targets + rows) * hidden * e + rows * vocab * (kMasterBytes + copy) +
         head_gradient(outline, method);
}

/// In the last layer's feed-forward half: gradients of its product and of that product's factors, in place of the
/// product itself and the last hidden states; or a weight's gradient or unpacked form beside the first of them.
int64_t backward_workspace(const Outline& outline, const AdapterMethod& method, const std::vector<LinearGroup>& groups,
                           const StepShape& step) {
  const LinearGroup &in = groups[groups.size() - 2], &out = groups.back();
  const int64_t e = step.element_bytes, a_token = in.out + (out.trains ? 0 : out.in) - outline.shape.hidden;
  int64_t largest = 0;
  for (const LinearSize& linear : outline.shape.linears) {
    largest = std::max(largest, linear.in * linear.out / outline.tensor);
  }
  const int64_t weight = method.trains_base()            ? kMasterBytes * largest
                         : is_packed(outline, groups, e) ? e * largest
                                                         : 0;
  return std::max(a_token * e * step.tokens(), weight > 0 ? weight + out.in * e * step.tokens() : 0);
}

void add_weights_and_loss(const Outline& outline, const AdapterMethod& method, const std::vector<LinearGroup>& groups,
                          const StepShape& step, StepWork& work) {
  const auto micro_batches = static_cast<double>(step.micro_batches), e = static_cast<double>(step.element_bytes);
  const auto targets = static_cast<double>(step.targets) * micro_batches;
  const auto head = static_cast<double>(local_vocabulary(outline) * outline.shape.hidden);
  work.product_flops += 4 * head * targets;
  work.bytes +=
      (16 + e) * static_cast<double>(local_vocabulary(outline)) * targets;  // logits: 4 read or written 4 times
  if (head_gradient(outline, method) > 0) {
    const double chunks =
        std::ceil(static_cast<double>(step.targets) / static_cast<double>(logits_at_once(outline, step)));
    work.gradient_flops += 2 * head * targets;
    work.bytes += 4 * kMasterBytes * head * chunks * micro_batches;
  }
  double weights = 0;
  for (const LinearGroup& group : groups) weights += static_cast<double>(group.weights);
  if (method.trains_base()) work.bytes += 4 * kMasterBytes * weights * micro_batches;  // made, then added
  if (is_packed(outline, groups, step.element_bytes)) {
    const double products = step.checkpointing == Checkpointing::full ? 3 : 2;
    work.bytes += products * micro_batches * (static_cast<double>(outline.linear_bytes) + e * weights);
  }
  // AdamW, norm, clipping, the copies in the run's dtype, zeroing.
  work.bytes += (44 + 4 + e) * static_cast<double>(outline.trained_here);
}

/// Elements a token that norms, rotary positions and the feed-forward product read and write, forward and backward.
UpdateCost::Passes model_passes(const LinearGroup* group, int64_t hidden) {
  const auto norms = static_cast<double>(2 * hidden), turned = static_cast<double>(group[0].out);
  const auto in = static_cast<double>(group[2].out), product = static_cast<double>(group[3].in);
  return {.input = 5 * norms + 2 * turned + in + product, .output = 6 * norms + 2 * turned + 2 * in + product};
}

}  // namespace

MemoryPlan memory_of(const Outline& outline, const AdapterMethod& method, const StepShape& step) {
  const std::vector<LinearGroup> groups = groups_of(outline, method);
  const int64_t copy = step.element_bytes == kMasterBytes ? 0 : step.element_bytes;
  const KeptBytes kept = kept_bytes(outline, method, groups, step);
  const int64_t done_with = tied_head(outline) ? 0 : head_gradient(outline, method);  // before the layers' backward
  MemoryPlan plan;
  plan.base = outline.frozen_bytes;
  plan.adapter = (kMasterBytes + copy) * outline.trained_here;
  plan.gradients = kMasterBytes * outline.trained_here;
  plan.moments = 2 * kMasterBytes * outline.trained_here;
  for (const LinearGroup& group : groups) plan.moments += group.state_bytes;
  plan.activations = kept.always;
  plan.workspace = kProductWorkspace + outline.gathered_bytes +
                   std::max(loss_workspace(outline, method, step),
                            kept.again + backward_workspace(outline, method, groups, step) - done_with);
  return plan;
}

StepWork work_of(const Outline& outline, const AdapterMethod& method, const StepShape& step) {
  const std::vector<LinearGroup> groups = groups_of(outline, method);
  const auto tokens = static_cast<double>(step.tokens() * step.micro_batches);
  const auto e = static_cast<double>(step.element_bytes);
  StepWork work;
  for (size_t i = 0; i < groups.size(); i += kGroupsOfLayer) {
    const UpdateCost::Passes passes = model_passes(&groups[i], outline.shape.hidden);
    const bool whole = step.checkpointing == Checkpointing::full, half = step.checkpointing == Checkpointing::mlp;
    const auto product = static_cast<double>(groups[i + 2].out + groups[i + 3].in);
    work.bytes += e * tokens * (passes.input + passes.output + (whole ? passes.input : half ? product : 0));
    const double attention = 2 * static_cast<double>(groups[i + 1].in * step.seq_len) * tokens;  // causal halves it
    work.attention_flops += attention * (whole ? 4.5 : 3.5);
    for (size_t g = 0; g < kGroupsOfLayer; ++g) {
      const LinearGroup& group = groups[i + g];
      const bool again = whole || (half && g >= 2);
      const double products = 2 * static_cast<double>(group.weights) * tokens;
      work.product_flops += (again ? 3 : 2) * products;
      if (method.trains_base()) work.gradient_flops += products;
      work.bytes += e * tokens * ((again ? 2 : 1) * group.forward_passes + group.backward_passes);
    }
  }
  add_weights_and_loss(outline, method, groups, step, work);
  return work;
}

}  // namespace corank
