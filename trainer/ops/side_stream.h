#pragma once
#include <ATen/ATen.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <functional>
#include <memory>
#include <optional>

namespace corank::ops {

/// A second queue of work on a CUDA device, beside the caller's stream. On the CPU work is done where it is asked for.
class SideStream {
 public:
  /// What wait() waits for; null where nothing is to be waited for.
  using Ticket = std::shared_ptr<c10::Event>;

  /// Makes the stream at the first run().
  explicit SideStream(at::Device device) : device_(device) {}

  /// Runs `work` with this stream as the current one, behind everything that the caller's stream holds by now. What
  /// `work` allocates is this stream's memory: it may be let go of as soon as its last use is enqueued on the caller's
  /// stream, because whatever takes its place comes from a later run().
  Ticket run(const std::function<void()>& work);
  /// What the caller's stream is given from now on comes after the run() of `ticket`.
  void wait(const Ticket& ticket) const;

 private:
  at::Device device_;
  std::optional<c10::Stream> stream_;
};

}  // namespace corank::ops
