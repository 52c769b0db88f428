#pragma once
#include <memory>
#include <string>

#include "trainer/layers/parameters.h"
#include "trainer/layers/update.h"
#include "trainer/ops/dropout.h"

namespace corank {

/// How a linear is split over tensor-parallel ranks.
enum class Split {
  column,  ///< by output rows: input replicated, output split (q, k, v, gate, up)
  row,     ///< by input columns: input split, partial outputs summed (o, down)
};

/// What a linear does in its block: q, k and v; their mixture's way out; gate and up; down.
enum class LinearRole { attention_in, attention_out, feed_forward_in, feed_forward_out };

/// What an adapter needs to know of the linear it sits on.
struct LinearSite {
  std::string name;         ///< module path, e.g. model.layers.0.self_attn.q_proj
  int64_t in = 0, out = 0;  ///< full sizes
  Split split = Split::column;
  Shard in_shard, out_shard;    ///< this rank's block of the input and output features, as dim 0 of a vector
  bool fan_in_fan_out = false;  ///< the family's files hold the weight as [in, out] (GPT-2's Conv1D)
  LinearRole role = LinearRole::attention_in;

  bool row() const { return split == Split::row; }
};

/// The trainable part on one linear. Holds its weights only through the ParameterStore.
class Adapter {
 public:
  virtual ~Adapter() = default;
  /// The update as the linear op takes it, for one forward pass.
  virtual std::shared_ptr<const Update> update(const ops::Dropout& dropout) const = 0;
  /// Dropout probability on the adapter's input.
  virtual double dropout() const = 0;
};

}  // namespace corank
