#pragma once
#include <cstdio>
#include <vector>

#include "launch/plan.h"
#include "launch/session.h"
#include "trainer/run/observer.h"

namespace corank {

/// Says the plan of a run when training begins, and at the end what was measured beside it. Its time is foretold where
/// the table of devices has the host's GPU, or for this CPU.
class PlanWatch : public Observer {
 public:
  /// With `json` it prints to standard error.
  PlanWatch(Session& session, const World& world, bool json);
  void on_resume(const ResumeRecord& record) override;
  void on_step(const StepRecord& record) override;
  void on_end(const EndRecord& record) override;

 private:
  bool on_gpu_;
  std::FILE* out_;
  Plan plan_;  ///< rank 0's
  bool knows_time_ = false;
  std::vector<double> seconds_;
  int64_t peak_bytes_ = 0;
};

}  // namespace corank
