#include "launch/bytes_table.h"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>

#include "launch/console.h"

namespace corank {
namespace {

int64_t total(const std::map<Purpose, int64_t>& bytes) {
  int64_t sum = 0;
  for (const auto& entry : bytes) sum += entry.second;
  return sum;
}

int64_t at_or_zero(const std::map<Purpose, int64_t>& bytes, Purpose purpose) {
  const auto found = bytes.find(purpose);
  return found == bytes.end() ? 0 : found->second;
}

/// Counted, the mean of this start's steps; empty without one.
StepBytes bytes_a_step(const EndRecord& end) {
  StepBytes bytes;
  const int64_t steps = end.step - end.first_step;
  if (steps == 0) return bytes;
  for (const Purpose purpose : kStepPurposes) {
    const auto i = static_cast<size_t>(purpose);
    bytes.payload[purpose] = end.bytes[i].payload_bytes / steps;
    for (const Link link : kLinks) bytes.sent[static_cast<size_t>(link)] += end.all_ranks[i].over(link).sent;
  }
  for (int64_t& sent : bytes.sent) sent /= steps;
  return bytes;
}

/// What depends on the method.
constexpr std::array kMethodPurposes{Purpose::adapter_gradients,  Purpose::weight_gradients,   Purpose::gradient_norm,
                                     Purpose::adapter_statistics, Purpose::tensor_activations, Purpose::base_gathers};

/// The mean micro-batches of this start's steps.
std::vector<BatchSize> mean_micro_batches(const Session& session, const EndRecord& end) {
  const TrainConfig& train = session.run().train;
  const int64_t rows = train.micro_batch_size * session.mesh().dp().size();
  const int64_t count = (train.global_batch_size + rows - 1) / rows;
  const int64_t all = count * (end.step - end.first_step);
  return std::vector<BatchSize>(static_cast<size_t>(count), {end.tokens / all, end.targets / all});
}

/// What full fine-tuning would hand over and send in the place of `counted`: what depends on the method is predicted.
StepBytes as_full(Session& session, const EndRecord& end, StepBytes counted) {
  AdapterConfig method;
  method.method = "full";
  const auto collectives = predicted_step(session, method, mean_micro_batches(session, end));
  const std::map<Purpose, int64_t> payload = payload_by_purpose(collectives);
  const Ledger::Snapshot predicted = traffic_of_all_ranks(session.mesh(), collectives);
  for (const Purpose purpose : kMethodPurposes) {
    const auto p = static_cast<size_t>(purpose);
    counted.payload[purpose] = at_or_zero(payload, purpose);
    for (const Link link : kLinks) {
      const int64_t ours = end.all_ranks[p].over(link).sent / (end.step - end.first_step);
      counted.sent[static_cast<size_t>(link)] += predicted[p].over(link).sent - ours;
    }
  }
  return counted;
}

/// "12.3 times less" where it is.
std::string times_less(int64_t ours, int64_t theirs) {
  if (ours == 0 || theirs <= ours) return "";
  return fmt::format("   {:.1f} times less", static_cast<double>(theirs) / static_cast<double>(ours));
}

/// As a shell takes it for one word.
std::string quoted(const std::string& path) {
  const bool plain = std::all_of(path.begin(), path.end(), [](unsigned char c) {
    return std::isalnum(c) || std::string_view("/._-+=:@%,").find(static_cast<char>(c)) != std::string_view::npos;
  });
  if (plain) return path;
  std::string word = "'";
  for (const char c : path) word += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return word + "'";
}

}  // namespace

std::vector<StepCollective> predicted_step(Session& session, const AdapterConfig& adapter,
                                           const std::vector<BatchSize>& micro_batches) {
  const Mesh& mesh = session.mesh();
  const RunConfig& run = session.run();
  const int64_t element = run.model.dtype == at::kFloat ? 4 : 2;
  const std::string sum = make_method(adapter)->trains_base() ? run.parallel.gradient_dtype : run.gradient_sum();
  return predict_step(traffic_shape(session.model(), adapter), adapter, mesh.tp().size(), mesh.dp().size(),
                      static_cast<int>(element), run.model.checkpointing, micro_batches, 1, gradient_sum(sum));
}

Ledger::Snapshot traffic_of_all_ranks(const Mesh& mesh, const std::vector<StepCollective>& collectives) {
  const std::vector<int>& hosts = mesh.world().ring().hosts();
  Ledger all;
  for (int rank = 0; rank < mesh.world().size(); ++rank) {
    const auto ring = [&](Axis axis) { return ring_of(axis, hosts, mesh.tp().size(), rank); };
    const Ledger::Snapshot one = traffic_by_purpose(collectives, ring);
    for (int p = 0; p < kNumPurposes; ++p) all.record(static_cast<Purpose>(p), one[p]);
  }
  return all.snapshot();
}

std::string bytes_table(const StepBytes& run, const StepBytes& full) {
  const auto line = [](std::string_view what, int64_t ours, int64_t theirs) {
    return fmt::format("  {:<20} {:>16} {:>18}", what, grouped(ours), grouped(theirs));
  };
  std::string text = fmt::format("  {:<20} {:>16} {:>18}\n", "bytes a step, rank 0", "this run", "full fine-tuning");
  for (const Purpose purpose : kStepPurposes) {
    const int64_t ours = at_or_zero(run.payload, purpose), theirs = at_or_zero(full.payload, purpose);
    if (ours || theirs) text += line(name(purpose), ours, theirs) + "\n";
  }
  const int64_t ours = total(run.payload), theirs = total(full.payload);
  text += line("total", ours, theirs) + times_less(ours, theirs) + "\n  sent by all ranks";
  for (const Link link : kLinks) {
    const auto i = static_cast<size_t>(link);
    if (!run.sent[i] && !full.sent[i]) continue;
    text += "\n" + line(name(link), run.sent[i], full.sent[i]) + times_less(run.sent[i], full.sent[i]);
  }
  return text;
}

std::string closing_text(Session& session, const EndRecord& end) {
  const RunConfig& run = session.run();
  const StepBytes counted = bytes_a_step(end);
  std::string text = fmt::format("{}: {}\n", session.method().trains_base() ? "model" : "adapter", end.result);
  if (session.mesh().world().size() > 1 && !counted.payload.empty()) {
    text += bytes_table(counted, as_full(session, end, counted)) + "\n";
  }
  const std::string resolved = quoted(run.output_dir + "/run.yaml"), result = quoted(end.result);
  const char* shape = run.model.path.empty() ? "model.shape=null " : "";
  if (session.method().trains_base()) return text + fmt::format("use it: {} {}model.path={}", resolved, shape, result);
  if (run.model.path.empty()) return text + fmt::format("use it: {} adapter.path={}", resolved, result);
  return text + fmt::format("use it: launch/chat {} --adapter {}", resolved, result);
}

}  // namespace corank
