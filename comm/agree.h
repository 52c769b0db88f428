#pragma once
#include <functional>
#include <string>
#include <vector>

#include "comm/communicator.h"

/// Decisions that all ranks must take together, and what they know together.
namespace corank {

/// Collective over `world`. The text of rank `root` on every rank.
std::string broadcast_text(Communicator& world, const std::string& text, int root = 0);
/// Collective over `world`. Runs `work` on rank 0 alone; if it throws, every rank throws the same error.
void on_rank_0(Communicator& world, const std::function<void()>& work);
/// Collective over `world`. Every rank runs `work`, which does not communicate; if it throws on any, every rank throws
/// the error of the first of them, with its rank and host unless that is rank 0.
void on_each_rank(Communicator& world, const std::function<void()>& work);

/// What all ranks must hold alike.
struct Fact {
  std::string name, value;  ///< of a value of several lines, messages show the lines that differ
  std::string remedy;       ///< what to do where ranks differ, a sentence
};
/// Collective over `world`. DisagreeError on every rank unless each holds rank 0's values. It names the first rank that
/// does not, its host and how many more there are, what differs and the remedies. Names and remedies are the same on
/// all ranks.
void require_same(Communicator& world, const std::vector<Fact>& facts);

/// Collective over `world`. The sum of all ranks' traffic, without times.
Ledger::Snapshot sum_over_ranks(Communicator& world, const Ledger::Snapshot& mine);

}  // namespace corank
