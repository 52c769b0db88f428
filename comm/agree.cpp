#include "comm/agree.h"

#include <fmt/format.h>

#include <cstring>
#include <filesystem>

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

}  // namespace

std::string broadcast_text(Communicator& world, const std::string& text) {
  const at::Tensor size = scalar(static_cast<int64_t>(text.size()), world);
  world.broadcast(size, 0, Purpose::startup);
  const int64_t length = size.item<int64_t>();
  at::Tensor bytes = world.rank() == 0 ? bytes_of(text, world.device())
                                       : at::empty({length}, at::TensorOptions(at::kByte).device(world.device()));
  world.broadcast(bytes, 0, Purpose::startup);
  return text_of(bytes);
}

void on_rank_0(Communicator& world, const std::function<void()>& work) {
  std::string failure;  // exit code, blank, message; empty: success
  if (world.rank() == 0) {
    try {
      work();
    } catch (const Error& e) {
      failure = fmt::format("{} {}", static_cast<int>(e.code()), e.what());
    } catch (const std::filesystem::filesystem_error& e) {
      failure = fmt::format("{} {}", static_cast<int>(ExitCode::storage), e.what());
    } catch (const std::exception& e) {
      failure = fmt::format("{} {}", static_cast<int>(ExitCode::internal), e.what());
    }
  }
  failure = broadcast_text(world, failure);
  if (failure.empty()) return;
  const size_t blank = failure.find(' ');
  throw_error(static_cast<ExitCode>(std::stoi(failure.substr(0, blank))), failure.substr(blank + 1));
}

void require_equal(Communicator& world, const std::string& text, const std::string& what) {
  const bool differs = broadcast_text(world, text) != text;
  const at::Tensor value = scalar(differs ? world.rank() : -1, world);
  world.all_reduce(value, ReduceOp::max, Purpose::startup);
  const int64_t rank = value.item<int64_t>();
  if (rank >= 0) {
    throw DisagreeError(
        fmt::format("{} is not the same on all ranks: rank {} differs from rank 0. Start every rank with the "
                    "same run file, overrides and inputs.",
                    what, rank));
  }
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
