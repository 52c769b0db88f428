#include "trainer/run/trainer.h"

#include <fmt/format.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include "configs/error.h"
#include "data/file.h"
#include "tests/storage_doubles.h"
#include "tests/support.h"
#include "trainer/files/adapter_file.h"
#include "trainer/methods/rank_budget.h"
#include "trainer/run/metrics.h"

// What a run writes, in which order and through what, and whom it tells.
namespace corank::test {
namespace {

namespace fs = std::filesystem;
using Lines = std::vector<std::string>;

ModelOptions tiny() {
  ModelOptions options;
  options.shape = "tiny-llama";
  options.dtype = at::kFloat;
  options.max_positions = 64;
  return options;
}

const LoaderOptions kOrder{{64, true, true, 7}, 4, 1, 0, 1};

/// A run on this process with everything around it, in a folder of its own.
struct OneRun {
  explicit OneRun(Storage& storage, const std::string& folder)
      : run(nullptr, 1, tiny(), AdapterConfig()),
        data(repository("configs/tiny/train.h5")),
        batches(data, kOrder),
        held_out(evaluation_batches(data, kOrder)),
        identity{"this run", AdapterConfig(), "tiny"},
        checkpoints(storage, folder, identity, {2}, run.mesh, run.store, *run.optimizer, *run.sum, *run.method) {}

  Trainer trainer(std::vector<Observer*> observers, const TrainerOptions& options) {
    return {run.parts(), batches, held_out, checkpoints, run.ledger, std::move(observers), options};
  }

  TrainingRun run;
  TokenFile data;
  Loader batches;
  std::vector<Batch> held_out;
  RunIdentity identity;
  Checkpoints checkpoints;
};

bool never() { return false; }

TrainerOptions four_steps() {
  TrainerOptions options;
  options.schedule = {"constant", 1e-2, 0, 4};
  options.logging_steps = 2;
  options.eval_steps = 3;
  options.save_steps = 1;
  return options;
}

/// Of `path` what lies below `folder`.
std::string below(const std::string& folder, const std::string& path) {
  return path == folder ? "." : fs::path(path).lexically_relative(folder).string();
}

std::string line(const std::string& folder, const StorageOperation& operation) {
  const std::string from = operation.from.empty() ? "" : below(folder, operation.from) + " to ";
  return operation.kind + " " + from + below(folder, operation.path);
}

/// Files of `folder` at any depth.
std::set<std::string> files_in(const std::string& folder) {
  std::set<std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    if (entry.is_regular_file()) files.insert(below(folder, entry.path().string()));
  }
  return files;
}

/// The files that operations leave, and how often each was written.
class Journal {
 public:
  explicit Journal(std::string folder) : folder_(std::move(folder)) {}

  void take(const StorageOperation& operation) {
    const std::string path = below(folder_, operation.path);
    if (operation.kind == "commit" || operation.kind == "append") {
      files_.insert(path);
      ++writes_[path];
    }
    if (operation.kind == "remove") take_away(path);
    if (operation.kind == "rename") {
      for (const std::string& name : take_away(below(folder_, operation.from))) files_.insert(path + name);
    }
  }
  const std::set<std::string>& files() const { return files_; }
  int writes(const std::string& path) const { return writes_.count(path) ? writes_.at(path) : 0; }

 private:
  /// What follows `path` in the names of the files that lie there.
  Lines take_away(const std::string& path) {
    Lines rests;
    std::erase_if(files_, [&](const std::string& file) {
      const bool inside = file == path || file.starts_with(path + "/");
      if (inside) rests.push_back(file.substr(path.size()));
      return inside;
    });
    return rests;
  }

  std::string folder_;
  std::set<std::string> files_;
  std::map<std::string, int> writes_;
};

class Saves : public testing::Test {
 protected:
  Saves() : one_(disk_, folder_.path()) {
    for (const int64_t step : {1, 2}) one_.checkpoints.save({step, {}});
  }

  Checkpoints through(Storage& storage) {
    return {storage,       folder_.path(),  one_.identity, {2}, one_.run.mesh, one_.run.store, *one_.run.optimizer,
            *one_.run.sum, *one_.run.method};
  }
  std::string path(int64_t step) const { return folder_.path("checkpoint-" + std::to_string(step)); }
  bool whole(int64_t step) const {
    std::string why;
    return verify_checkpoint(path(step), why).has_value();
  }
  /// The operations of a third save.
  std::vector<StorageOperation> operations_of_a_save() {
    std::vector<StorageOperation> operations;
    WatchedStorage recording(disk_, [&](const StorageOperation& operation) { operations.push_back(operation); });
    through(recording).save({3, {}});
    return operations;
  }
  void back_to_two() {
    for (const auto& entry : fs::directory_iterator(folder_.path())) fs::remove_all(entry.path());
    for (const int64_t step : {1, 2}) one_.checkpoints.save({step, {}});
  }

  const TemporaryFolder folder_;
  DiskStorage disk_;
  OneRun one_;
};

TEST_F(Saves, WriteTheManifestLastAndTidyUpAfterwards) {
  Lines lines;
  for (const StorageOperation& operation : operations_of_a_save()) lines.push_back(line(folder_.path(), operation));
  EXPECT_EQ(lines, (Lines{"remove checkpoint-3", "make_folders checkpoint-3", "create checkpoint-3/adapter.h5",
                          "write checkpoint-3/adapter.h5", "commit checkpoint-3/adapter.h5",
                          "create checkpoint-3/state.h5", "write checkpoint-3/state.h5", "commit checkpoint-3/state.h5",
                          "create checkpoint-3/manifest.json", "write checkpoint-3/manifest.json",
                          "commit checkpoint-3/manifest.json", "sync_folder .", "remove pruned-checkpoint-1",
                          "rename checkpoint-1 to pruned-checkpoint-1", "remove pruned-checkpoint-1"}));
}

TEST_F(Saves, AFailureAnywhereIsAStorageErrorAndLosesNothing) {
  const std::vector<StorageOperation> operations = operations_of_a_save();
  for (const bool stays : {false, true}) {  // one operation fails, or that and all after it
    for (size_t n = 0; n < operations.size(); ++n) {
      SCOPED_TRACE(line(folder_.path(), operations[n]) + (stays ? " and all after it" : ""));
      back_to_two();
      size_t count = 0;
      WatchedStorage failing(disk_, [&](const StorageOperation& operation) {
        const size_t i = count++;
        if (i == n || (stays && i > n)) throw StorageError(operation.path + ": planted.");
      });
      Checkpoints checkpoints = through(failing);
      const bool tidying = operations[n].path.find("pruned-") != std::string::npos;
      if (tidying) {
        EXPECT_EQ(checkpoints.save({3, {}}), path(3));
      } else {
        EXPECT_THROW(checkpoints.save({3, {}}), StorageError);
        EXPECT_TRUE(whole(1));
      }
      EXPECT_TRUE(whole(2));
      // Where the disk fails for good, what was complete cannot be taken away.
      const bool complete = tidying || (stays && operations[n].kind == "sync_folder");
      EXPECT_EQ(one_.checkpoints.newest(), path(complete ? 3 : 2));
      EXPECT_EQ(one_.checkpoints.save({3, {}}), path(3));
      EXPECT_EQ(one_.checkpoints.newest(), path(3));
    }
  }
}

TEST(WholeRun, WritesEverythingThroughItsStorage) {
  const TemporaryFolder folder;
  Journal journal(folder.path());
  DiskStorage disk;
  WatchedStorage storage(disk, [&](const StorageOperation& operation) { journal.take(operation); });
  OneRun one(storage, folder.path());
  const auto metrics = metrics_file(storage, folder.path("metrics.jsonl"));
  Trainer trainer = one.trainer({metrics.get()}, four_steps());
  trainer.run(trainer.start({}, "auto"), never, [&] {
    write_peft_folder(storage, folder.path("adapter"),
                      collect_adapter(one.run.store, *one.run.method, one.identity, one.run.mesh.tp()));
    return folder.path("adapter");
  });
  EXPECT_EQ(journal.files(), files_in(folder.path()));
  for (const char* file :
       {"checkpoint-3/manifest.json", "checkpoint-4/state.h5", "adapter/adapter_model.safetensors"}) {
    EXPECT_EQ(journal.files().count(file), 1u) << file;
  }
  for (const int64_t step : {1, 2, 3, 4}) {
    for (const char* file : {"adapter.h5", "state.h5", "manifest.json"}) {
      EXPECT_EQ(journal.writes(fmt::format("checkpoint-{}/{}", step, file)), 1) << step << file;
    }
  }
  EXPECT_EQ(journal.writes("metrics.jsonl"), 1 + 3);  // made, and a line for each logged step
  // The test of the test.
  std::ofstream(folder.path("past-it")) << "x";
  EXPECT_NE(journal.files(), files_in(folder.path()));
}

/// A line for all that is told.
struct Listener : Observer {
  void on_start(const StartRecord& r) override { add("start of {} parameters", r.trainable_parameters); }
  void on_resume(const ResumeRecord& r) override {
    add("resume after {} from '{}', {} passed over, {} set aside", r.step, name(r.from), r.passed_over.size(),
        r.set_aside.size());
  }
  void on_step(const StepRecord& r) override {
    add("step {} of {}{}", r.step, r.max_steps, r.logged ? ", logged" : "");
  }
  void on_evaluation(const EvaluationRecord& r) override {
    add("evaluation after {} of {}", r.step, r.target_tokens > 0);
  }
  void on_save(const SaveRecord& r) override { add("save {} in {}", r.step, name(r.folder)); }
  void on_end(const EndRecord& r) override {
    add("end {} to {} of {}: '{}'", r.first_step, r.step, r.max_steps, r.result);
  }

  template <class... Values>
  void add(fmt::format_string<Values...> text, Values... values) {
    lines.push_back(fmt::format(text, std::move(values)...));
  }
  static std::string name(const std::string& path) { return fs::path(path).filename().string(); }
  Lines take() { return std::exchange(lines, {}); }

  Lines lines;
};

TEST(Events, AreToldInTheirOrder) {
  const TemporaryFolder folder;
  DiskStorage disk;
  OneRun one(disk, folder.path());
  Listener listener, other;
  TrainerOptions options = four_steps();
  options.save_steps = 2;
  StartRecord about;
  about.trainable_parameters = 7;
  const auto result = [] { return std::string("there"); };
  {
    Trainer trainer = one.trainer({&listener, &other}, options);
    int64_t steps = 0;
    trainer.run(
        trainer.start(about, "auto"), [&] { return ++steps == 3; }, result);
  }
  EXPECT_EQ(other.lines, listener.lines);
  EXPECT_EQ(listener.take(),
            (Lines{"start of 7 parameters", "resume after 0 from '', 0 passed over, 0 set aside", "step 1 of 4",
                   "step 2 of 4, logged", "save 2 in checkpoint-2", "evaluation after 3 of true", "step 3 of 4, logged",
                   "save 3 in checkpoint-3", "end 0 to 3 of 4: ''"}));
  std::ofstream(folder.path("checkpoint-3/state.h5")) << "damaged";
  Trainer trainer = one.trainer({&listener}, options);
  trainer.run(trainer.start(about, "auto"), never, result);
  EXPECT_EQ(listener.take(),
            (Lines{"start of 7 parameters", "resume after 2 from 'checkpoint-2', 1 passed over, 1 set aside",
                   "evaluation after 3 of true", "step 3 of 4, logged", "step 4 of 4, logged", "save 4 in checkpoint-4",
                   "end 2 to 4 of 4: 'there'"}));
  trainer.run(trainer.start(about, folder.path("checkpoint-4")), never, result);
  EXPECT_EQ(listener.take(),
            (Lines{"start of 7 parameters", "resume after 4 from 'checkpoint-4', 0 passed over, 0 set aside",
                   "end 4 to 4 of 4: 'there'"}));
}

/// What trains over a model that others train over too: in it only while it takes a step.
class Tenant {
 public:
  Tenant(Model& model, const Mesh& mesh, const AdapterConfig& config)
      : model_(model), mesh_(mesh), method_(make_method(config)), data_(repository("configs/tiny/train.h5")) {
    for (const NamedWeight& saved : saved_modules(model, config)) saved_.emplace_back(saved.weight, *saved.weight);
    start_method(*method_, model, store_, mesh, at::kFloat, 42);
    for (AdaptedLinear* linear : model.linears()) {
      if (linear->adapter()) adapters_.emplace_back(linear, nullptr);
    }
    exchange();
    optimizer_ = std::make_unique<Optimizer>(store_, OptimizerOptions());
    sum_ = plain_sum().make(mesh, {store_.gradients_of(GradientScope::everywhere),
                                   store_.gradients_of(GradientScope::data), method_->gradient_purpose()});
    batches_ = std::make_unique<Loader>(data_, kOrder);
  }

  double step(int64_t number) {
    exchange();
    const StepParts parts{mesh_, model_, *method_, store_, *optimizer_, *sum_, dropout_};
    const double loss = train_step(parts, batches_->next(), number, {1e-2, 1.0}).loss;
    exchange();
    return loss;
  }
  const at::Tensor& masters() const { return store_.masters(); }

 private:
  void exchange() {
    for (auto& [linear, adapter] : adapters_) adapter = linear->set_adapter(std::move(adapter));
    for (auto& [weight, value] : saved_) std::swap(*weight, value);
  }

  Model& model_;
  const Mesh& mesh_;
  std::unique_ptr<AdapterMethod> method_;
  ParameterStore store_;
  std::vector<std::pair<AdaptedLinear*, std::unique_ptr<Adapter>>> adapters_;
  std::vector<std::pair<ops::Weight*, ops::Weight>> saved_;
  std::unique_ptr<Optimizer> optimizer_;
  std::unique_ptr<GradientSum> sum_;
  DropoutKeys dropout_{42, at::kCPU};
  TokenFile data_;
  std::unique_ptr<Loader> batches_;
};

AdapterConfig config_of(const std::string& method) {
  AdapterConfig config;
  config.method = method;
  if (method == "lora") {
    config.lora_dropout = 0.1;
    config.modules_to_save = {"norm"};
  }
  config.options.edit<AdaLoraConfig>() = {
      .init_r = 6, .target_r = 3, .tinit = 1, .tfinal = 2, .deltaT = 1, .total_step = 6, .kept_ranks = {}};
  return config;
}

/// Two methods that train over one model in turn.
class InTurn : public testing::TestWithParam<std::pair<const char*, const char*>> {};

TEST_P(InTurn, IsTwoRunsOfTheirOwnToTheBit) {
  Ledger ledger;
  const Mesh mesh(make_solo_communicator(at::kCPU, ledger), 1);
  const auto shared = load_model(tiny(), mesh.tp()), one = load_model(tiny(), mesh.tp()),
             another = load_model(tiny(), mesh.tp());
  const AdapterConfig first = config_of(GetParam().first), second = config_of(GetParam().second);
  Tenant a(*shared, mesh, first), b(*shared, mesh, second);
  Tenant a_alone(*one, mesh, first), b_alone(*another, mesh, second);
  std::vector<double> in_turn, apart;
  for (int64_t step = 1; step <= 4; ++step) {
    for (Tenant* tenant : {&a, &b}) in_turn.push_back(tenant->step(step));
  }
  for (int64_t step = 1; step <= 4; ++step) apart.push_back(a_alone.step(step));
  for (int64_t step = 1; step <= 4; ++step) {
    apart.insert(apart.begin() + 2 * step - 1, b_alone.step(step));
  }
  EXPECT_EQ(in_turn, apart);
  EXPECT_TRUE(at::equal(a.masters(), a_alone.masters()));
  EXPECT_TRUE(at::equal(b.masters(), b_alone.masters()));
  // The test of the test: another start of the same method is another adapter.
  EXPECT_FALSE(at::equal(a.masters(), Tenant(*one, mesh, first).masters()));
}

INSTANTIATE_TEST_SUITE_P(Methods, InTurn,
                         testing::Values(std::pair{"lora", "dora"}, std::pair{"adalora", "mora"},
                                         std::pair{"lora", "lora"}),
                         [](const auto& pair) { return std::string(pair.param.first) + "_" + pair.param.second; });

}  // namespace
}  // namespace corank::test
