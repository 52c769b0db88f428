#pragma once
#include <array>
#include <map>
#include <string>
#include <vector>

#include "launch/session.h"
#include "trainer/run/observer.h"
#include "trainer/run/traffic.h"

namespace corank {

/// The purposes of a training step, in the order of tables.
inline constexpr std::array kStepPurposes{
    Purpose::adapter_gradients, Purpose::weight_gradients,   Purpose::tensor_activations, Purpose::vocabulary_loss,
    Purpose::gradient_norm,     Purpose::adapter_statistics, Purpose::base_gathers,       Purpose::data_control};

/// The predicted collectives of one step of this rank, as the run's method or as full fine-tuning.
std::vector<StepCollective> predicted_step(Session& session, const AdapterConfig& adapter,
                                           const std::vector<BatchSize>& micro_batches);
/// Bytes of a step, as tables show them.
struct StepBytes {
  std::map<Purpose, int64_t> payload;         ///< of rank 0
  std::array<int64_t, kLinks.size()> sent{};  ///< by all ranks together, by link
};
/// What all ranks of the mesh together send of collectives that are the same on each, by purpose.
Ledger::Snapshot traffic_of_all_ranks(const Mesh& mesh, const std::vector<StepCollective>& collectives);
/// A table of bytes a step by purpose and by link, this run beside full fine-tuning with the same layout.
std::string bytes_table(const StepBytes& run, const StepBytes& full);
/// The last lines of `train`: where the result is, the table, how to use the result.
std::string closing_text(Session& session, const EndRecord& end);

}  // namespace corank
