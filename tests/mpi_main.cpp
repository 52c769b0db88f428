// A GoogleTest main for programs under mpirun. Rank 0 prints the usual report, the other ranks only their failures. A
// test passes only if it passes on all ranks. A hang ends the job after --deadline-s seconds, an exception at once.
#include "tests/mpi_main.h"

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>

#include "comm/mpi_comm.h"
#include "configs/error.h"

namespace corank {
namespace {

std::optional<World> the_world;  // the tests of GoogleTest take no arguments

void say(const std::string& text) {
  std::fprintf(stderr, "rank %d: %s\n", the_world->rank(), text.c_str());
  std::fflush(stderr);
}

/// The name of the test that runs, for messages from any thread.
class CurrentTest {
 public:
  void set(const std::string& name) {
    const std::lock_guard lock(mutex_);
    name_ = name;
  }
  std::string get() const {
    const std::lock_guard lock(mutex_);
    return name_;
  }

 private:
  mutable std::mutex mutex_;
  std::string name_ = "start-up";
};

/// Ends the process, and with it the job, unless destroyed within `seconds`.
class Deadline {
 public:
  Deadline(int seconds, const CurrentTest& test)
      : thread_([this, seconds, &test](std::stop_token stop) { wait(stop, seconds, test); }) {}

 private:
  void wait(const std::stop_token& stop, int seconds, const CurrentTest& test) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, stop, std::chrono::seconds(seconds), [] { return false; });
    if (stop.stop_requested()) return;
    say(test.get() + " is not done after " + std::to_string(seconds) + " s");
    std::_Exit(static_cast<int>(ExitCode::hang));  // no MPI call: another thread is inside MPI
  }

  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::jthread thread_;  // last: it uses the other members
};

/// Tells failures of ranks that print nothing else, and makes a test fail everywhere that failed anywhere.
class EveryRank : public ::testing::EmptyTestEventListener {
 public:
  EveryRank(const MpiComm& comm, CurrentTest& test) : comm_(comm), test_(test) {}

  void OnTestStart(const ::testing::TestInfo& info) override {
    test_.set(std::string(info.test_suite_name()) + "." + info.name());
  }
  void OnTestPartResult(const ::testing::TestPartResult& result) override {
    if (!result.failed() || comm_.rank() == 0) return;
    const std::string file = result.file_name() != nullptr ? result.file_name() : "unknown file";
    say(test_.get() + " failed at " + file + ":" + std::to_string(result.line_number()) + "\n" + result.message());
  }
  void OnTestEnd(const ::testing::TestInfo& info) override {
    const bool passed = info.result()->Passed() || info.result()->Skipped();
    if (comm_.min_max(passed).first == 0 && passed) ADD_FAILURE() << "failed on another rank";
    test_.set("the end of " + test_.get());
  }

 private:
  const MpiComm& comm_;
  CurrentTest& test_;
};

int take_deadline(int& argc, char** argv) {
  constexpr std::string_view kFlag = "--deadline-s=";
  int seconds = 100, kept = 1;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (argument.starts_with(kFlag)) {
      seconds = std::stoi(std::string(argument.substr(kFlag.size())));
    } else {
      argv[kept++] = argv[i];
    }
  }
  argc = kept;
  return seconds;
}

void set_listeners(const MpiComm& comm, CurrentTest& test) {
  ::testing::TestEventListeners& listeners = ::testing::UnitTest::GetInstance()->listeners();
  if (comm.rank() != 0) {
    delete listeners.Release(listeners.default_result_printer());
    delete listeners.Release(listeners.default_xml_generator());
  }
  listeners.Append(new EveryRank(comm, test));
}

/// True on every rank if every rank ran tests and all passed.
bool run_tests(const MpiComm& comm, CurrentTest& test) {
  set_listeners(comm, test);
  bool passed = RUN_ALL_TESTS() == 0;
  if (::testing::UnitTest::GetInstance()->test_to_run_count() == 0) {
    say("no test ran");
    passed = false;
  }
  test.set("the end of all tests");
  return comm.min_max(passed).first == 1;
}

int run(int argc, char** argv) {
  CurrentTest test;
  const int seconds = take_deadline(argc, argv);
  ::testing::InitGoogleTest(&argc, argv);
  GTEST_FLAG_SET(catch_exceptions, false);  // a rank that throws leaves its peers waiting: the job must end
  the_world.emplace(&argc, &argv);
  const Deadline deadline(seconds, test);
  try {
    const bool passed = run_tests(MpiComm::duplicate(the_world->comm(), "tests"), test);
    the_world->finish();
    return passed ? 0 : 1;
  } catch (const c10::Error& error) {
    say(test.get() + " threw: " + error.what());
  } catch (const std::exception& error) {
    say(test.get() + " threw: " + error.what());
  }
  World::abort(1);
}

}  // namespace

const World& test_world() { return the_world.value(); }

std::vector<int> tensor_sizes() {
  std::vector<int> sizes;
  for (const int size : {1, 2, 4}) {
    if (test_world().size() % size == 0) sizes.push_back(size);
  }
  return sizes;
}

}  // namespace corank

int main(int argc, char** argv) { return corank::run(argc, argv); }
