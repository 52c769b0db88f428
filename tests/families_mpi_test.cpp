#include "tests/golden_case.h"
#include "tests/mpi_main.h"
#include "trainer/files/adapter_file.h"

// Every model family in every layout: the losses of one rank and of transformers, and the bytes that were predicted.
namespace corank::test {
namespace {

constexpr int64_t kSteps = 6;

struct Setting {
  std::string family, method;
};

std::ostream& operator<<(std::ostream& out, const Setting& setting) {
  return out << setting.family << ' ' << setting.method;
}

std::vector<Setting> settings() {
  std::vector<Setting> all;
  for (const std::string& family : family_cases()) {
    for (const char* method : {"lora", "full"}) all.push_back({family, method});
  }
  return all;
}

class Families : public testing::TestWithParam<Setting> {
 protected:
  Families() : golden_(GetParam().family), file_(read_adapter(golden_.path("adapter"))) {
    adapter_ = file_.config;
    adapter_.method = GetParam().method;
    options_.path = golden_.path("model");
    options_.dtype = at::kFloat;
    options_.max_positions = 64;
  }

  bool full() const { return adapter_.method == "full"; }

  std::unique_ptr<TrainingRun> start(const World* world, int tensor) {
    OptimizerOptions optimizer;
    optimizer.weight_decay = full() ? 0 : 0.01;
    auto run = std::make_unique<TrainingRun>(world, tensor, options_, adapter_, optimizer);
    if (!full()) load_tensors(file_, run->store);
    return run;
  }

  /// The losses; the bytes of every step are those predicted.
  std::vector<double> train(TrainingRun& run) {
    const StepBatches batches = golden_.batches(run.mesh.dp().rank(), run.mesh.dp().size());
    std::vector<double> losses;
    for (int64_t step = 1; step <= kSteps; ++step) {
      const double rate = full() ? 1e-4 : lr_at({"cosine", 1e-3, 3, 20}, step);
      const Ledger::Snapshot before = run.ledger.snapshot();
      losses.push_back(run.step(batches, step, rate, full() ? 0 : 1).loss);
      expect_bytes(difference(run.ledger.snapshot(), before), predicted_bytes(run, options_, adapter_, batches, step),
                   "in step " + std::to_string(step));
    }
    return losses;
  }

  at::Tensor reference() const {
    return full() ? SafetensorsFile(golden_.path("full.safetensors")).read("full.losses_20")
                  : golden_.value("losses_20");
  }

  Golden golden_;
  SavedAdapter file_;
  AdapterConfig adapter_;
  ModelOptions options_;
};

TEST_P(Families, SameLossesTensorsAndPredictedBytesInEveryLayout) {
  const auto alone = start(nullptr, 1);
  const std::vector<double> expected = train(*alone);
  const auto whole = alone->store.gather(alone->store.masters(), alone->mesh.tp());
  const at::Tensor golden_losses = reference();
  for (const int tensor : {1, 2}) {
    if (test_world().size() % tensor != 0) continue;
    SCOPED_TRACE("tp " + std::to_string(tensor));
    const auto run = start(&test_world(), tensor);
    const std::vector<double> losses = train(*run);
    for (size_t i = 0; i < losses.size(); ++i) {
      EXPECT_NEAR(losses[i] / expected[i], 1, 1e-5) << "step " << i + 1;
      EXPECT_NEAR(losses[i] / golden_losses[static_cast<int64_t>(i)].item<double>(), 1, 1e-4) << "step " << i + 1;
    }
    // Put together from shards: what a checkpoint and an export hold.
    const auto gathered = run->store.gather(run->store.masters(), run->mesh.tp());
    for (const auto& [name, value] : whole) {
      const auto found = std::find_if(gathered.begin(), gathered.end(), [&](const auto& e) { return e.first == name; });
      ASSERT_NE(found, gathered.end()) << name;
      EXPECT_LT(relative_error(found->second, value), 1e-3) << name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, Families, testing::ValuesIn(settings()), [](const auto& param) {
  return param.param.family.substr(param.param.family.rfind('/') + 1) + "_" + param.param.method;
});

}  // namespace
}  // namespace corank::test
