#include "launch/console.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "configs/text.h"
#include "launch/bytes_table.h"
#include "launch/same_start.h"

namespace corank {

Console::Console(Session& session, bool json)
    : session_(session), out_(json ? stderr : stdout), bar_(isatty(STDERR_FILENO) == 1) {}

void Console::say(const std::string& text) {
  if (bar_) fmt::print(stderr, "\r\033[K");
  fmt::print(out_, "{}\n", printable_lines(text));
  std::fflush(out_);
}

void Console::on_start(const StartRecord& record) {
  for (const std::string& remark : record.remarks) say(remark);
  introduce(record);
  say(fmt::format("bytes a step: {} of gradients from each rank", human_bytes(record.gradient_bytes)));
}

void Console::on_resume(const ResumeRecord& record) {
  for (const std::string& damaged : record.passed_over) say("passed over " + damaged);
  if (!record.from.empty()) {
    say(fmt::format("resuming from {} after step {}", record.from, record.step));
  } else if (!record.passed_over.empty()) {
    say("no checkpoint was ever completed: starting at step 0");
  }
  for (const std::string& line : record.set_aside) say(line);
}

void Console::on_step(const StepRecord& r) {
  if (!r.logged) return;
  say(fmt::format(
      "step {:>{}}/{}  loss {:.4f}  grad_norm {:.4f}  lr {:.3e}  {:.0f} tokens/s  {:.2f} s{}", r.step,
      std::to_string(r.max_steps).size(), r.max_steps, r.loss, r.grad_norm, r.learning_rate, r.tokens_per_second,
      r.step_seconds,
      r.eval_loss ? fmt::format("  eval_loss {:.4f}  eval_accuracy {:.4f}", *r.eval_loss, *r.eval_accuracy) : ""));
  if (bar_) draw_bar(r);
}

void Console::on_end(const EndRecord& record) {
  if (record.step < record.max_steps) {
    say(fmt::format("stopped after step {} and saved: start the same command again to go on", record.step));
    return;
  }
  if (record.first_step == record.max_steps) {
    say(fmt::format("already complete after step {}: nothing was left to train", record.max_steps));
  }
  say(closing_text(session_, record));
}

void Console::draw_bar(const StepRecord& r) {
  constexpr int kWidth = 30;
  seconds_per_step_ = seconds_per_step_ == 0 ? r.step_seconds : 0.9 * seconds_per_step_ + 0.1 * r.step_seconds;
  const int done = static_cast<int>(kWidth * r.step / r.max_steps);
  const auto left = static_cast<int64_t>(seconds_per_step_ * static_cast<double>(r.max_steps - r.step));
  fmt::print(stderr, "[{:=<{}}{: <{}}] {}/{}  {}:{:02}:{:02} left", "", done, "", kWidth - done, r.step, r.max_steps,
             left / 3600, left / 60 % 60, left % 60);
  std::fflush(stderr);
}

void Console::introduce(const StartRecord& r) {
  say(fmt::format("trainable params: {} || all params: {} || trainable%: {:.4f}", grouped(r.trainable_parameters),
                  grouped(r.all_parameters),
                  100.0 * static_cast<double>(r.trainable_parameters) / static_cast<double>(r.all_parameters)));
  const int dp = r.data_parallel;
  const int64_t micro = r.micro_batch_size, global = r.global_batch_size;
  const std::string parts =
      global % (dp * micro) == 0
          ? fmt::format("{} dp x {} accumulation x {} micro-batch", dp, global / (dp * micro), micro)
          : fmt::format("{} micro-batches of {}, unevenly over {} dp", global / micro, micro, dp);
  say(fmt::format("ranks {} = dp {} x tp {}, global batch {} = {}", r.ranks, dp, r.tensor_parallel, global, parts));
  say(fmt::format("backend {}, {} on {}, {} thread{} a rank ({} rank{} on this host)", r.backend, r.dtype, r.device,
                  r.threads, r.threads == 1 ? "" : "s", r.ranks_on_host, r.ranks_on_host == 1 ? "" : "s"));
  say(r.hosts);
  say(fmt::format("memory a rank: frozen and trained weights {}, adapter with gradients and moments {}",
                  human_bytes(r.base_bytes), human_bytes(r.training_bytes)));
}

StartRecord start_record(Session& session, const World& world, int threads) {
  const RunConfig& run = session.run();
  const Mesh& mesh = session.mesh();
  const auto bytes = payload_by_purpose(predicted_step(session, run.adapter, {}));
  const auto gradients = bytes.find(session.method().gradient_purpose());
  StartRecord r;
  r.trainable_parameters = session.store().num_parameters();
  r.all_parameters =
      num_base_parameters(session.model()) + (session.method().trains_base() ? 0 : r.trainable_parameters);
  r.ranks = world.size();
  r.data_parallel = mesh.dp().size();
  r.tensor_parallel = mesh.tp().size();
  r.ranks_on_host = world.local_size();
  r.threads = threads;
  r.hosts = describe_hosts(world);
  r.global_batch_size = run.train.global_batch_size;
  r.micro_batch_size = run.train.micro_batch_size;
  r.backend = run.parallel.backend;
  r.dtype = run.model.dtype == at::kFloat ? "float32" : "bfloat16";
  r.device = mesh.device().str();
  r.base_bytes = base_bytes(session.model());
  const int64_t kept = gradient_sum(run.gradient_sum()).kept_bytes;
  r.training_bytes = session.store().num_local() * (4 * 4 + kept);  // masters, gradients, two moments, float32
  r.gradient_bytes = gradients == bytes.end() ? 0 : gradients->second;
  return r;
}

std::vector<std::string> sample_remarks(const TokenFile& file, const SamplerOptions& options) {
  const Sampler sampler(file, options);
  const int64_t left_out = file.size() - sampler.num_used(), cut = sampler.num_truncated();
  std::vector<std::string> lines;
  if (left_out > 0) {
    lines.push_back(fmt::format("{}: {} of {} samples have no target within data.seq_len {} and are left out",
                                file.path(), grouped(left_out), grouped(file.size()), options.seq_len));
  }
  if (cut > 0) {
    lines.push_back(fmt::format("{}: {} of {} samples are longer than data.seq_len {} and are cut at their end",
                                file.path(), grouped(cut), grouped(sampler.num_used()), options.seq_len));
  }
  return lines;
}

std::string json_text(const nlohmann::ordered_json& value) {
  return value.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

std::string human_bytes(int64_t bytes) {
  constexpr const char* kUnits[] = {"B", "kB", "MB", "GB", "TB"};
  auto value = static_cast<double>(bytes);
  int unit = 0;
  while (value >= 1000 && unit < 4) {
    value /= 1000;
    ++unit;
  }
  return unit == 0 ? fmt::format("{} B", bytes) : fmt::format("{:.1f} {}", value, kUnits[unit]);
}

std::string grouped(int64_t number) {
  std::string digits = std::to_string(number);
  for (auto i = static_cast<int64_t>(digits.size()) - 3; i > 0; i -= 3) digits.insert(static_cast<size_t>(i), 1, ',');
  return digits;
}

}  // namespace corank
