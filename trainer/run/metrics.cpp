#include "trainer/run/metrics.h"

#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>

#include "configs/error.h"
#include "data/file.h"
#include "data/json_object.h"
#include "data/storage.h"

namespace corank {
namespace {

using nlohmann::ordered_json;

constexpr int64_t kMaxBytes = int64_t{1} << 30;

class MetricsFile : public Observer {
 public:
  MetricsFile(Storage& storage, const std::string& path) : storage_(storage), path_(path) {}

  void on_resume(const ResumeRecord& record) override { storage_.write_file(path_, records_until(record.step)); }
  void on_step(const StepRecord& record) override {
    if (record.logged) storage_.append(path_, to_json(record) + "\n");
  }

 private:
  std::string records_until(int64_t step) const {
    if (!std::filesystem::exists(path_)) return "";
    std::istringstream old(read_file(path_, kMaxBytes));
    std::string kept, line;
    while (std::getline(old, line)) {
      if (step_of(line) <= step) kept += line + "\n";
    }
    return kept;
  }

  /// Beyond every step for what is no record, such as the half line that a kill leaves.
  static int64_t step_of(const std::string& line) {
    try {
      return JsonObject(line, "a record").get<int64_t>("step");
    } catch (const InputError&) {
      return INT64_MAX;
    }
  }

  Storage& storage_;
  std::string path_;
};

/// Bytes handed to collectives, by purpose.
ordered_json payload_json(const Ledger::Snapshot& bytes) {
  ordered_json result = ordered_json::object();
  for (int p = 0; p < kNumPurposes; ++p) {
    if (bytes[p].calls > 0) result[std::string(name(static_cast<Purpose>(p)))] = bytes[p].payload_bytes;
  }
  return result;
}

/// The same by link and purpose, with what was sent.
ordered_json links_json(const Ledger::Snapshot& bytes) {
  ordered_json result = ordered_json::object();
  for (const Link link : kLinks) {
    ordered_json& purposes = result[std::string(name(link))] = ordered_json::object();
    for (int p = 0; p < kNumPurposes; ++p) {
      const auto [payload, sent] = bytes[p].over(link);
      if (payload || sent) {
        purposes[std::string(name(static_cast<Purpose>(p)))] = {{"payload", payload}, {"sent", sent}};
      }
    }
  }
  return result;
}

}  // namespace

std::string to_json(const StepRecord& r) {
  ordered_json record{{"step", r.step},
                      {"epoch", r.epoch},
                      {"loss", r.loss},
                      {"grad_norm", r.grad_norm},
                      {"learning_rate", r.learning_rate},
                      {"target_tokens", r.target_tokens},
                      {"tokens_per_second", r.tokens_per_second},
                      {"step_seconds", r.step_seconds},
                      {"peak_memory_bytes", r.peak_memory_bytes},
                      {"bytes", payload_json(r.bytes)},
                      {"links", links_json(r.bytes)}};
  if (r.eval_loss) record["eval_loss"] = *r.eval_loss;
  if (r.eval_accuracy) record["eval_accuracy"] = *r.eval_accuracy;
  return record.dump();
}

std::unique_ptr<Observer> metrics_file(Storage& storage, const std::string& path) {
  return std::make_unique<MetricsFile>(storage, path);
}

}  // namespace corank
