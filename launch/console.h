#pragma once
#include <cstdio>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "launch/session.h"
#include "trainer/run/observer.h"

namespace corank {

/// What a run prints: to standard output, with --json to standard error. Borrows the session.
class Console : public Observer {
 public:
  Console(Session& session, bool json);
  void on_start(const StartRecord& record) override;
  void on_resume(const ResumeRecord& record) override;
  void on_step(const StepRecord& record) override;
  void on_end(const EndRecord& record) override;
  /// Trainable parameters as PEFT counts them, the batch's product, threads, memory.
  void introduce(const StartRecord& record);

 private:
  void say(const std::string& text);
  void draw_bar(const StepRecord& record);

  Session& session_;
  std::FILE* out_;
  bool bar_;
  double seconds_per_step_ = 0;
};

/// What there is to say of a run before it starts, but for remarks on its data.
StartRecord start_record(Session& session, const World& world, int threads);
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
