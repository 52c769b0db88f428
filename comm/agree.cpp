#include "comm/agree.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <set>
#include <sstream>

#include "comm/world.h"
#include "configs/error.h"

namespace corank {
namespace {

at::Tensor bytes_of(const std::string& text, at::Device device) {
  at::Tensor host = at::empty({static_cast<int64_t>(text.size())}, at::TensorOptions(at::kByte));
  if (!text.empty()) std::memcpy(host.mutable_data_ptr(), text.data(), text.size());
  return host.to(device);
}

std::string text_of(const at::Tensor& bytes) {
  const at::Tensor host = bytes.to(at::kCPU).contiguous();
  return {reinterpret_cast<const char*>(host.const_data_ptr<uint8_t>()), static_cast<size_t>(host.numel())};
}

at::Tensor scalar(int64_t value, const Communicator& comm) {
  return at::full({1}, value, at::TensorOptions(at::kLong).device(comm.device()));
}

/// The error of `code` by its own type, which is what callers catch.
[[noreturn]] void throw_error(ExitCode code, const std::string& message) {
  switch (code) {
    case ExitCode::usage:
      throw ConfigError(message);
    case ExitCode::data:
      throw InputError(message);
    case ExitCode::missing:
      throw MissingError(message);
    case ExitCode::storage:
      throw StorageError(message);
    case ExitCode::stopped:
      throw CommError(message);
    case ExitCode::disagree:
      throw DisagreeError(message);
    case ExitCode::internal:
      throw InternalError(message);
    default:
      throw Error(code, message);
  }
}

/// What `work` throws, as exit code, blank, message; empty: nothing.
std::string failure_of(const std::function<void()>& work) {
  try {
    work();
    return "";
  } catch (const Error& e) {
    return fmt::format("{} {}", static_cast<int>(e.code()), e.what());
  } catch (const std::filesystem::filesystem_error& e) {
    return fmt::format("{} {}", static_cast<int>(ExitCode::storage), e.what());
  } catch (const std::exception& e) {
    return fmt::format("{} {}", static_cast<int>(ExitCode::internal), e.what());
  }
}

/// Throws what failure_of() found, `where` before its message.
void throw_failure(const std::string& failure, const std::string& where) {
  if (failure.empty()) return;
  const size_t blank = failure.find(' ');
  throw_error(static_cast<ExitCode>(std::stoi(failure.substr(0, blank))), where + failure.substr(blank + 1));
}

std::string place_of(const Communicator& world) { return fmt::format("rank {} on {}", world.rank(), host_name()); }

/// How many ranks say `mine`, and the first of them (the number of ranks where none does).
std::pair<int64_t, int64_t> count_and_first(Communicator& world, bool mine) {
  const at::Tensor count = scalar(mine ? 1 : 0, world), first = scalar(mine ? world.rank() : world.size(), world);
  world.all_reduce(count, ReduceOp::sum, Purpose::startup);
  world.all_reduce(first, ReduceOp::min, Purpose::startup);
  return {count.item<int64_t>(), first.item<int64_t>()};
}

/// The lines of `text` that `other` does not have, on one line.
std::string lines_beyond(const std::string& text, const std::string& other) {
  std::set<std::string> known;
  std::istringstream others(other), lines(text);
  for (std::string line; std::getline(others, line);) known.insert(line);
  std::string result;
  for (std::string line; std::getline(lines, line);) {
    if (known.count(line)) continue;
    result += (result.empty() ? "" : ", ") + line.substr(std::min(line.find_first_not_of(' '), line.size()));
  }
  return result;
}

/// What this rank's `text` has and rank 0's `other` has not, and the reverse.
std::string fact_difference(const std::string& text, const std::string& other) {
  const std::string mine = lines_beyond(text, other), rank_0s = lines_beyond(other, text);
  if (mine.empty() && rank_0s.empty()) return "the same lines as rank 0 in another order";
  const auto or_nothing = [](const std::string& lines) { return lines.empty() ? "nothing" : lines; };
  return fmt::format("{}, on rank 0 {}", or_nothing(mine), or_nothing(rank_0s));
}

}  // namespace

std::string broadcast_text(Communicator& world, const std::string& text, int root) {
  const at::Tensor size = scalar(static_cast<int64_t>(text.size()), world);
  world.broadcast(size, root, Purpose::startup);
  const int64_t length = size.item<int64_t>();
  at::Tensor bytes = world.rank() == root ? bytes_of(text, world.device())
                                          : at::empty({length}, at::TensorOptions(at::kByte).device(world.device()));
  world.broadcast(bytes, root, Purpose::startup);
  return text_of(bytes);
}

void on_rank_0(Communicator& world, const std::function<void()>& work) {
  throw_failure(broadcast_text(world, world.rank() == 0 ? failure_of(work) : ""), "");
}

void on_each_rank(Communicator& world, const std::function<void()>& work) {
  const std::string failure = failure_of(work);
  const auto [count, first] = count_and_first(world, !failure.empty());
  if (count == 0) return;
  const int root = static_cast<int>(first);
  const std::string where = broadcast_text(world, place_of(world), root);
  throw_failure(broadcast_text(world, failure, root), root == 0 ? "" : where + ": ");
}

void require_same(Communicator& world, const std::vector<Fact>& facts) {
  const std::string origin = broadcast_text(world, place_of(world));
  std::string differences;
  for (const Fact& fact : facts) {
    const std::string other = broadcast_text(world, fact.value);
    if (other == fact.value) continue;
    differences += fmt::format(" {}: {}. {}", fact.name, fact_difference(fact.value, other), fact.remedy);
  }
  const auto [count, first] = count_and_first(world, !differences.empty());
  if (count == 0) return;
  const int root = static_cast<int>(first);
  const std::string more = count == 1 ? "" : fmt::format(" and {} more", count - 1);
  const std::string where = broadcast_text(world, place_of(world), root);
  throw DisagreeError(
      fmt::format("Ranks differ: {}{} from {}.{}", where, more, origin, broadcast_text(world, differences, root)));
}

Ledger::Snapshot sum_over_ranks(Communicator& world, const Ledger::Snapshot& mine) {
  constexpr int64_t kCounts = 5;
  at::Tensor counts = at::empty({kNumPurposes, kCounts}, at::TensorOptions(at::kLong));
  auto* out = counts.mutable_data_ptr<int64_t>();
  for (const Traffic& t : mine) {
    for (const int64_t count :
         {t.calls, t.payload_bytes, t.sent_bytes, t.payload_between_hosts, t.sent_between_hosts}) {
      *out++ = count;
    }
  }
  counts = counts.to(world.device());
  world.all_reduce(counts, ReduceOp::sum, Purpose::startup);
  counts = counts.to(at::kCPU);
  const auto* in = counts.const_data_ptr<int64_t>();
  Ledger::Snapshot all;
  for (Traffic& traffic : all) {
    traffic = {in[0], in[1], in[2], 0, in[3], in[4]};
    in += kCounts;
  }
  return all;
}

}  // namespace corank
