#include "trainer/run/checkpoint_folder.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "configs/error.h"
#include "data/file.h"
#include "data/h5.h"
#include "data/storage.h"
#include "tests/support.h"

namespace corank::test {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

/// Checkpoints of a few bytes, made as the trainer makes them.
class CheckpointFolder : public testing::Test {
 protected:
  std::string path(int64_t step) const { return folder_.path("checkpoint-" + std::to_string(step)); }

  void make(int64_t step, const std::string& identity = "mine") { make_at(path(step), step, step, identity, identity); }
  /// In a folder and with a state.h5 that may contradict the manifest.
  void make_at(const std::string& place, int64_t step, int64_t state_step, const std::string& identity,
               const std::string& state_identity) {
    h5::Writer state;
    state.attribute("step", state_step);
    state.attribute("identity", state_identity);
    disk_.make_folders(place);
    Manifest manifest{step, identity, {}};
    for (const auto& [name, bytes] : {std::pair{"adapter.h5", std::string("weights")}, {"state.h5", state.finish()}}) {
      disk_.write_file(place + "/" + name, bytes);
      manifest.files.push_back({name, static_cast<int64_t>(bytes.size()), sha256(bytes)});
    }
    disk_.write_file(place + "/manifest.json", manifest_json(manifest, "a model", {{"torch", "2"}}));
  }

  std::set<std::string> names(const std::string& within = "") const {
    std::set<std::string> names;
    for (const auto& entry : fs::directory_iterator(folder_.path(within))) {
      names.insert(entry.path().filename().string());
    }
    return names;
  }
  std::string newest(const std::string& identity = "mine") {
    passed_over_.clear();
    return newest_checkpoint(folder_.path(), identity, passed_over_).value_or("");
  }
  void change_manifest(int64_t step, const std::function<void(json&)>& change) {
    json manifest = json::parse(read_file(path(step) + "/manifest.json"));
    change(manifest);
    std::ofstream(path(step) + "/manifest.json") << manifest.dump();
  }
  std::string why_not(const std::string& place) {
    std::string why;
    EXPECT_FALSE(verify_checkpoint(place, why)) << place;
    return why;
  }

  const TemporaryFolder folder_;
  DiskStorage disk_;
  std::vector<std::string> passed_over_;
};

TEST_F(CheckpointFolder, TheNewestWholeOneIsFound) {
  EXPECT_EQ(newest(), "");
  for (const int64_t step : {5, 100, 20}) make(step);
  EXPECT_EQ(newest(), path(100));
  std::string why;
  const auto manifest = verify_checkpoint(path(20), why);
  ASSERT_TRUE(manifest) << why;
  EXPECT_EQ(manifest->step, 20);
  EXPECT_EQ(manifest->identity, "mine");
  EXPECT_THROW(newest("another"), ConfigError);
}

TEST_F(CheckpointFolder, AnyFlippedBitOfTheManifestIsNoticed) {
  make(5);
  make(10);
  const std::string file = path(10) + "/manifest.json", good = read_file(file);
  const json parsed = json::parse(good);
  for (size_t i = 0; i < good.size(); ++i) {
    for (const char bit : {1, 4, 32}) {
      std::string bad = good;
      bad[i] ^= bit;
      std::ofstream(file, std::ios::binary) << bad;
      const json now = json::parse(bad, nullptr, false);
      // White space means nothing, and without its name the hash is one that older manifests lack too.
      if (now == parsed || (now.is_object() && !now.contains("sha256"))) continue;
      ASSERT_EQ(newest(), path(5)) << bad;
      ASSERT_EQ(passed_over_.size(), 1u);
    }
  }
}

TEST_F(CheckpointFolder, ManifestsWithoutAHashAreStillRead) {
  make(5);
  make(10);
  for (const int64_t step : {5, 10}) change_manifest(step, [](json& m) { m.erase("sha256"); });
  EXPECT_EQ(newest(), path(10));
  change_manifest(10, [](json& m) { m["identity"] = "minf"; });  // state.h5 knows better
  EXPECT_EQ(newest(), path(5));
  EXPECT_NE(passed_over_.at(0).find("state.h5 and manifest.json are not of one step and run"), std::string::npos);
}

TEST_F(CheckpointFolder, NameManifestAndStateAgreeOnTheStep) {
  make(5);
  fs::rename(path(5), path(6));
  EXPECT_NE(why_not(path(6)).find("step 5"), std::string::npos);
  EXPECT_NE(why_not(path(6) + "/").find("step 5"), std::string::npos);
  EXPECT_THROW(require_checkpoint(path(6), "mine"), InputError);
  make_at(path(7), 7, 8, "mine", "mine");
  EXPECT_NE(why_not(path(7)).find("one step"), std::string::npos);
  make_at(path(8), 8, 8, "mine", "yours");
  EXPECT_NE(why_not(path(8)).find("run"), std::string::npos);
  fs::rename(path(6), folder_.path("best"));
  EXPECT_NO_THROW(require_checkpoint(folder_.path("best"), "mine"));
}

TEST_F(CheckpointFolder, HostileManifestsArePassedOver) {
  make(5);
  make(10);
  const std::string file = path(10) + "/manifest.json";
  const json good = json::parse(read_file(file));
  std::vector<std::string> bad{"",
                               "{",
                               "[]",
                               "1",
                               "null",
                               std::string(300'000, '['),
                               std::string(2 << 20, ' '),
                               std::string("{}\0", 3),
                               "{\"step\":1,\"step\":1}",
                               "\xff"};
  for (const char* key : {"format", "version", "step", "identity", "files"}) {
    for (const json& value : {json(nullptr), json("x"), json(-1), json(1e300), json(true), json::array(),
                              json::object(), json::parse("18446744073709551615")}) {
      json changed = good;
      changed.erase("sha256");
      changed[key] = value;
      if (changed[key] != good[key]) bad.push_back(changed.dump());
    }
  }
  for (const char* key : {"bytes", "sha256"}) {
    json changed = good;
    changed.erase("sha256");
    changed["files"]["state.h5"][key] = nullptr;
    bad.push_back(changed.dump());
  }
  for (const std::string& text : bad) {
    std::ofstream(file, std::ios::binary) << text;
    EXPECT_EQ(newest(), path(5)) << text.substr(0, 200);
    prune_checkpoints(disk_, folder_.path(), "mine", {1}, 5);
    EXPECT_TRUE(fs::exists(path(5)));
  }
  fs::remove(file);
  fs::create_directory(file);
  EXPECT_EQ(newest(), path(5));
}

TEST_F(CheckpointFolder, PruningCountsWholeCheckpointsOfThisRunAlone) {
  for (const int64_t step : {1, 2, 3, 4, 5, 6, 7, 8}) make(step);
  make(9, "another");
  fs::remove(path(7) + "/manifest.json");
  std::ofstream(path(8) + "/state.h5") << "cut";
  fs::create_directory(folder_.path("checkpoint-010"));
  fs::create_directory(folder_.path("set-aside"));
  prune_checkpoints(disk_, folder_.path(), "mine",
                    {2, folder_.path() + "/../" + fs::path(folder_.path()).filename().string() + "/checkpoint-2/"}, 6);
  EXPECT_EQ(names(), (std::set<std::string>{"checkpoint-2", "checkpoint-5", "checkpoint-6", "checkpoint-7",
                                            "checkpoint-8", "checkpoint-9", "checkpoint-010", "set-aside"}));
}

TEST_F(CheckpointFolder, WhatWasJustWrittenStaysWhateverElseIsThere) {
  for (const int64_t step : {5, 6, 100}) make(step);
  prune_checkpoints(disk_, folder_.path(), "mine", {1}, 6);
  EXPECT_EQ(names(), (std::set<std::string>{"checkpoint-6", "checkpoint-100"}));
}

TEST_F(CheckpointFolder, AResumedCheckpointIsNotPrunedByAnotherNameOfIt) {
  for (const int64_t step : {1, 2, 3}) make(step);
  fs::create_directory_symlink(folder_.path(), folder_.path("link"));
  prune_checkpoints(disk_, folder_.path("link"), "mine", {1, path(1)}, 3);
  EXPECT_EQ(names(), (std::set<std::string>{"checkpoint-1", "checkpoint-3", "link"}));
  prune_checkpoints(disk_, folder_.path(), "mine", {1, folder_.path("link/checkpoint-1")}, 3);
  EXPECT_EQ(names(), (std::set<std::string>{"checkpoint-1", "checkpoint-3", "link"}));
}

TEST_F(CheckpointFolder, WhatLiesAheadIsSetAsideByName) {
  for (const int64_t step : {10, 20, 30}) make(step);
  std::ofstream(path(30) + "/state.h5") << "damaged, and perhaps of use";
  make(40);
  fs::remove(path(40) + "/manifest.json");
  const std::vector<std::string> lines = set_aside_beyond(disk_, folder_.path(), 10);
  ASSERT_EQ(lines.size(), 2u);
  const std::string aside = folder_.path("set-aside/checkpoint-");
  EXPECT_EQ(lines[0], path(30) + " lies ahead of step 10: set aside as " + aside + "30");
  EXPECT_EQ(names(), (std::set<std::string>{"checkpoint-10", "checkpoint-40", "set-aside"}));
  make(20);  // reached again
  set_aside_beyond(disk_, folder_.path(), 0);
  EXPECT_EQ(names(), (std::set<std::string>{"checkpoint-40", "set-aside"}));
  EXPECT_EQ(names("set-aside"),
            (std::set<std::string>{"checkpoint-10", "checkpoint-20", "checkpoint-20.2", "checkpoint-30"}));
  EXPECT_EQ(newest(), "");
  require_checkpoint(aside + "20", "mine");
  require_checkpoint(aside + "20.2", "mine");
}

TEST_F(CheckpointFolder, TheSameStepIsWrittenAgain) {
  make(5);
  fs::remove(path(5) + "/manifest.json");
  EXPECT_EQ(free_checkpoint_path(disk_, folder_.path(), 5), path(5));
  EXPECT_EQ(names(), std::set<std::string>{});
  make(5);
  free_checkpoint_path(disk_, folder_.path(), 5);
  EXPECT_EQ(names("set-aside"), std::set<std::string>{"checkpoint-5"});
}

TEST_F(CheckpointFolder, LeftoversOfInterruptedWritesAreRemoved) {
  make(5);
  for (const char* folder : {"adapter", "mine", "pruned-checkpoint-3"}) fs::create_directory(folder_.path(folder));
  for (const char* file : {"run.yaml.17-0.tmp", "adapter/adapter_config.json.17-0.tmp", "checkpoint-5/state.h5.1-2.tmp",
                           "pruned-checkpoint-3/state.h5", "mine/notes.17-0.tmp", "notes.tmp"}) {
    std::ofstream(folder_.path(file)) << "left";
  }
  remove_leftovers(disk_, folder_.path());
  EXPECT_EQ(names(), (std::set<std::string>{"adapter", "checkpoint-5", "mine", "notes.tmp"}));
  EXPECT_TRUE(fs::is_empty(folder_.path("adapter")));
  EXPECT_TRUE(fs::exists(folder_.path("mine/notes.17-0.tmp")));
  EXPECT_EQ(newest(), path(5));
  EXPECT_FALSE(fs::exists(path(5) + "/state.h5.1-2.tmp"));
}

}  // namespace
}  // namespace corank::test
