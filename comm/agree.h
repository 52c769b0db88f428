#pragma once
#include <functional>
#include <string>

#include "comm/communicator.h"

/// Decisions that all ranks must take together, and what they know together.
namespace corank {

/// Collective over `world`. Rank 0's text on every rank.
std::string broadcast_text(Communicator& world, const std::string& text);
/// Collective over `world`. Runs `work` on rank 0 alone; if it throws, every rank throws the same error.
void on_rank_0(Communicator& world, const std::function<void()>& work);
/// Collective over `world`. DisagreeError on every rank unless all hold the same text (`what` names it).
void require_equal(Communicator& world, const std::string& text, const std::string& what);

/// Collective over `world`. The sum of all ranks' traffic, without times.
Ledger::Snapshot sum_over_ranks(Communicator& world, const Ledger::Snapshot& mine);

}  // namespace corank
