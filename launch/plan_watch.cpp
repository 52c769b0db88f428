#include "launch/plan_watch.h"

#include <fmt/format.h>

#include <algorithm>

#include "launch/bytes_table.h"
#include "launch/console.h"
#include "launch/plan_text.h"

namespace corank {
namespace {

/// Hosts as the world has them, joined by what a plan assumes where nobody says.
Cluster cluster_of_session(Session& session, const World& world) {
  Cluster cluster;
  cluster.ranks = world.size();
  cluster.ranks_per_host = world.size() % world.local_size() == 0 ? world.local_size() : 1;
  cluster.between = {bandwidth_of(kUsualGbits), kUsualLatencyUs};
  const std::string name = session.mesh().device().is_cuda() ? gpu_of_host() : "cpu";
  if (!name.empty()) cluster.device = device_rates(name);
  return cluster;
}

double median_of(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<int64_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

int64_t counted_payload(const EndRecord& end) {
  int64_t bytes = 0;
  for (const Purpose purpose : kStepPurposes) bytes += end.bytes[static_cast<size_t>(purpose)].payload_bytes;
  return bytes / (end.step - end.first_step);
}

}  // namespace

PlanWatch::PlanWatch(Session& session, const World& world, bool json)
    : on_gpu_(session.mesh().device().is_cuda()), out_(json ? stderr : stdout) {
  if (!session.leader()) return;
  const Cluster cluster = cluster_of_session(session, world);
  const int tensor = session.mesh().tp().size();
  plan_ = make_plan(session.run(), outline_of(session.run(), tensor, world.size() / tensor), cluster);
  knows_time_ = !cluster.device.name.empty();
}

void PlanWatch::on_resume(const ResumeRecord&) {
  std::string text =
      fmt::format("planned: {} a rank ({} resident, {} activations, {} workspace)", gib(plan_.memory.total()),
                  gib(plan_.memory.resident()), gib(plan_.memory.activations), gib(plan_.memory.workspace));
  if (knows_time_) {
    text += fmt::format(", {:.3f} s a step of which {:.3f} s communication, where every sequence is full",
                        plan_.step_seconds(), plan_.communication_seconds());
  }
  fmt::print(out_, "{}\n", text);
  std::fflush(out_);
}

void PlanWatch::on_step(const StepRecord& record) {
  seconds_.push_back(record.step_seconds);
  peak_bytes_ = std::max(peak_bytes_, record.peak_memory_bytes);
}

void PlanWatch::on_end(const EndRecord& record) {
  if (record.step == record.first_step || seconds_.empty()) return;
  fmt::print(out_, "{:<28} {:>16} {:>16}\n", "plan beside measurement", "planned", "measured");
  fmt::print(out_, "  {:<26} {:>16} {:>16}\n", "bytes a step, rank 0", grouped(plan_.payload()),
             grouped(counted_payload(record)));
  if (on_gpu_) {
    fmt::print(out_, "  {:<26} {:>16} {:>16}\n", "peak memory of a rank", gib(plan_.memory.total()), gib(peak_bytes_));
  }
  if (knows_time_) {
    fmt::print(out_, "  {:<26} {:>16.3f} {:>16.3f}\n", "seconds a step (median)", plan_.step_seconds(),
               median_of(seconds_));
  }
  std::fflush(out_);
}

}  // namespace corank
