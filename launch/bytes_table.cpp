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

/// Counted on this rank, the mean of this start's steps; empty without one.
std::map<Purpose, int64_t> bytes_a_step(const EndRecord& end) {
  std::map<Purpose, int64_t> bytes;
  if (end.step == end.first_step) return bytes;
  for (const Purpose purpose : kStepPurposes) {
    bytes[purpose] = end.bytes[static_cast<size_t>(purpose)].payload_bytes / (end.step - end.first_step);
  }
  return bytes;
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

std::map<Purpose, int64_t> predicted_bytes(Session& session, const AdapterConfig& adapter,
                                           const std::vector<BatchSize>& micro_batches) {
  const Mesh& mesh = session.mesh();
  const RunConfig& run = session.run();
  const int64_t element = run.model.dtype == at::kFloat ? 4 : 2;
  const std::string sum = make_method(adapter)->trains_base() ? run.parallel.gradient_dtype : run.gradient_sum();
  return predict_step_bytes(traffic_shape(session.model(), adapter), adapter, mesh.tp().size(), mesh.dp().size(),
                            static_cast<int>(element), run.model.checkpointing, micro_batches, 1, gradient_sum(sum));
}

std::string bytes_table(const std::map<Purpose, int64_t>& run, const std::map<Purpose, int64_t>& full) {
  std::string text = fmt::format("  {:<20} {:>16} {:>18}\n", "bytes a step, rank 0", "this run", "full fine-tuning");
  for (const Purpose purpose : kStepPurposes) {
    const int64_t ours = at_or_zero(run, purpose), theirs = at_or_zero(full, purpose);
    if (ours || theirs) text += fmt::format("  {:<20} {:>16} {:>18}\n", name(purpose), grouped(ours), grouped(theirs));
  }
  text += fmt::format("  {:<20} {:>16} {:>18}", "total", grouped(total(run)), grouped(total(full)));
  if (total(run) > 0 && total(full) > total(run))
    text += fmt::format("   {:.1f} times less", static_cast<double>(total(full)) / static_cast<double>(total(run)));
  return text;
}

std::string closing_text(Session& session, const EndRecord& end) {
  const RunConfig& run = session.run();
  const std::map<Purpose, int64_t> counted = bytes_a_step(end);
  std::string text = fmt::format("{}: {}\n", session.method().trains_base() ? "model" : "adapter", end.result);
  if (session.mesh().world().size() > 1 && !counted.empty()) {
    // What does not depend on the method was counted; the gradients of full fine-tuning are predicted.
    std::map<Purpose, int64_t> full = counted;
    AdapterConfig method;
    method.method = "full";
    full.erase(Purpose::adapter_gradients);
    full[Purpose::weight_gradients] = at_or_zero(predicted_bytes(session, method, {}), Purpose::weight_gradients);
    text += bytes_table(counted, full) + "\n";
  }
  const std::string resolved = quoted(run.output_dir + "/run.yaml"), result = quoted(end.result);
  const char* shape = run.model.path.empty() ? "model.shape=null " : "";
  if (session.method().trains_base()) return text + fmt::format("use it: {} {}model.path={}", resolved, shape, result);
  if (run.model.path.empty()) return text + fmt::format("use it: {} adapter.path={}", resolved, result);
  return text + fmt::format("use it: launch/chat {} --adapter {}", resolved, result);
}

}  // namespace corank
