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
/// A table of bytes a step by purpose, this run beside full fine-tuning with the same layout.
std::string bytes_table(const std::map<Purpose, int64_t>& run, const std::map<Purpose, int64_t>& full);
/// The last lines of `train`: where the result is, the table, how to use the result.
std::string closing_text(Session& session, const EndRecord& end);

}  // namespace corank
