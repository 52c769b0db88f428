#include <gtest/gtest.h>

#include "comm/agree.h"
#include "comm/backends.h"
#include "configs/error.h"
#include "mpi_main.h"

namespace corank {
namespace {

class Agree : public ::testing::Test {
 protected:
  /// The message of the error of type E that `work` throws on this rank; empty: none.
  template <class E>
  static std::string message_of(const std::function<void()>& work) {
    try {
      work();
    } catch (const E& error) {
      return error.what();
    }
    return "";
  }

  bool last() const { return rank == size - 1; }

  Ledger ledger;
  std::unique_ptr<Communicator> world = make_communicator("mpi", test_world(), ledger);
  int rank = world->rank(), size = world->size();
};

TEST_F(Agree, TextsComeFromAnyRank) {
  for (int root = 0; root < size; ++root) {
    EXPECT_EQ(broadcast_text(*world, "of " + std::to_string(rank), root), "of " + std::to_string(root));
  }
}

TEST_F(Agree, AnErrorOfOneRankIsEachRanks) {
  EXPECT_NO_THROW(on_each_rank(*world, [] {}));
  const std::string text = message_of<MissingError>([&] {
    on_each_rank(*world, [&] {
      if (last()) throw MissingError("no file");
    });
  });
  EXPECT_EQ(text, size == 1 ? "no file" : "rank " + std::to_string(size - 1) + " on " + host_name() + ": no file");
}

TEST_F(Agree, OfErrorsOnSeveralRanksTheFirstIsSaid) {
  const auto fail = [&] { throw InputError("on " + std::to_string(rank)); };
  EXPECT_EQ(message_of<InputError>([&] { on_each_rank(*world, fail); }), "on 0");
}

TEST_F(Agree, EqualFactsPass) {
  EXPECT_NO_THROW(require_same(*world, {{"a", "1", ""}, {"b", "", ""}, {"c", "x\ny", ""}}));
  EXPECT_NO_THROW(require_same(*world, {}));
}

TEST_F(Agree, ADifferenceIsEachRanksAndSaysWhereAndWhat) {
  const std::string text = message_of<DisagreeError>([&] {
    require_same(*world, {{"same", "1", "Do nothing."},
                          {"run", last() ? "rate: 1\nsize: 3" : "rate: 1\nsize: 2", "Give all the same run."},
                          {"settings", last() ? "" : "N=1", "Set them."}});
  });
  const std::string host = host_name();
  const std::string expected = "Ranks differ: rank " + std::to_string(size - 1) + " on " + host + " from rank 0 on " +
                               host +
                               ". run: size: 3, on rank 0 size: 2. Give all the same run. settings: nothing, on rank 0 "
                               "N=1. Set them.";
  EXPECT_EQ(text, size == 1 ? "" : expected);
}

TEST_F(Agree, RanksThatDifferAreCounted) {
  const std::string text = message_of<DisagreeError>([&] {
    require_same(*world, {{"rank", std::to_string(rank), ""}});
  });
  const bool counted = text.find(" and " + std::to_string(size - 2) + " more from rank 0") != std::string::npos;
  EXPECT_EQ(counted, size > 2) << text;
}

TEST_F(Agree, ADifferenceInOrderIsOne) {
  const std::string text = message_of<DisagreeError>([&] {
    require_same(*world, {{"list", last() ? "a\nb" : "b\na", "Sort it."}});
  });
  EXPECT_EQ(text.find("list: the same lines as rank 0 in another order. Sort it.") == std::string::npos, size == 1)
      << text;
}

TEST_F(Agree, TheWorldKnowsItsHostsAndItsLeast) {
  EXPECT_EQ(test_world().hosts(), 1);
  EXPECT_EQ(test_world().least(7 - rank), 7 - (size - 1));
  EXPECT_EQ(mpi_version().substr(0, 8), "Open MPI");
  const std::map<std::string, std::string> none{{"no_such_setting", ""}};
  EXPECT_EQ(mpi_settings({"no_such_setting"}), none);
}

}  // namespace
}  // namespace corank
