#pragma once
#include <cstdio>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "launch/session.h"
#include "trainer/run/metrics.h"

namespace corank {

/// What a run prints. Only rank 0 prints to standard output; with --json text goes to standard error.
class Console : public Observer {
 public:
  Console(bool leader, bool json);
  void say(const std::string& text);
  void on_step(const StepRecord& record) override;
  /// The first lines of a run: trainable parameters as PEFT counts them, the batch's product, threads, memory.
  void introduce(Session& session, const World& world, int threads);

 private:
  void draw_bar(const StepRecord& record);

  bool leader_;
  std::FILE* out_;
  bool bar_;
  double seconds_per_step_ = 0;
};

/// How many samples of a token file are left out of a pass over it and how many are cut, a line each; none where all
/// are whole.
std::vector<std::string> sample_remarks(const TokenFile& file, const SamplerOptions& options);
/// `value` on one line; of strings that are no UTF-8 the wrong bytes are replaced.
std::string json_text(const nlohmann::ordered_json& value);
/// "21.0 MB", decimal units.
std::string human_bytes(int64_t bytes);
/// "4,884,480".
std::string grouped(int64_t number);

}  // namespace corank
