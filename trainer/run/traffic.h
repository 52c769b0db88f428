#pragma once
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "comm/gradient_sum.h"
#include "trainer/methods/methods.h"
#include "trainer/models/families.h"

namespace corank {

/// A frozen weight where its residency keeps it.
struct StoredSize {
  int64_t order = 0, gather_bytes = 0;  ///< as in FrozenWeight
};

/// What decides the bytes of a step, known before anything is built.
struct TrafficShape {
  int64_t hidden = 0, vocab = 0, layers = 0;
  std::vector<LinearSize> linears;
  std::vector<StoredSize> stored;  ///< of each linear
  struct Other {
    WeightRole role = WeightRole::norm;
    int64_t elements = 0;  ///< of one rank
    GradientScope scope = GradientScope::data;
    bool saved = false;  ///< trains beside the adapter (modules_to_save)
  };
  std::vector<Other> others;
};
TrafficShape traffic_shape(Model& model, const AdapterConfig& adapter);

/// One micro-batch of a rank, as far as bytes go.
struct BatchSize {
  int64_t tokens = 0, targets = 0;
};

/// The collectives of one optimizer step of one rank, from formulas alone (methods 11.1; README, "Bytes"): never from
/// counters. Groups of one rank have none. e = bytes of an activation. tensor_activations of a micro-batch of N tokens:
/// N D e for the embedding, 2 N D e a layer forward, as much backward (less one where nothing below the first layer
/// trains), what recomputation repeats, and M D e for the loss.
std::vector<StepCollective> predict_step(const TrafficShape& shape, const AdapterConfig& adapter, int tensor, int data,
                                         int activation_bytes, Checkpointing checkpointing,
                                         const std::vector<BatchSize>& micro_batches, int64_t step = 1,
                                         const GradientSumEntry& sum = plain_sum());

/// Bytes that one rank hands to these collectives.
std::map<Purpose, int64_t> payload_by_purpose(const std::vector<StepCollective>& collectives);
/// What the ledger of a rank counts of these collectives, but for the time. `ring`: of each group that it is in.
Ledger::Snapshot traffic_by_purpose(const std::vector<StepCollective>& collectives,
                                    const std::function<Ring(Axis)>& ring);

}  // namespace corank
