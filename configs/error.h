#pragma once
#include <stdexcept>
#include <string>

namespace corank {

/// How the process ends (README, "Exit codes"). Scripts and schedulers act on these numbers.
enum class ExitCode : int {
  ok = 0,
  usage = 64,     ///< command line or run file
  data = 65,      ///< data or model file is damaged or does not fit
  missing = 66,   ///< an input does not exist
  internal = 70,  ///< a broken contract of our own
  storage = 74,   ///< writing failed
  stopped = 75,   ///< stopped on request or by a peer's death, and saved: start the same command again
  hang = 90,
  disagree = 91,  ///< ranks hold different views of the run
  corrupt = 92,
  no_progress = 93,
};

/// Every error that a user can meet. The message is one paragraph: what, where (file, line, key, tensor, rank), the
/// offending and the allowed values, and what to do. Libraries throw; only main() ends the process.
class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ExitCode code() const { return code_; }

 private:
  ExitCode code_;
};

/// The command line or the run file is wrong.
struct ConfigError : Error {
  explicit ConfigError(const std::string& message) : Error(ExitCode::usage, message) {}
};
/// A data, model or adapter file is damaged or does not fit the run.
struct InputError : Error {
  explicit InputError(const std::string& message) : Error(ExitCode::data, message) {}
};
/// An input does not exist or cannot be opened.
struct MissingError : Error {
  explicit MissingError(const std::string& message) : Error(ExitCode::missing, message) {}
};
/// An output could not be written completely.
struct StorageError : Error {
  explicit StorageError(const std::string& message) : Error(ExitCode::storage, message) {}
};
/// A peer or the network failed in a collective.
struct CommError : Error {
  explicit CommError(const std::string& message) : Error(ExitCode::stopped, message) {}
};
/// The ranks do not hold the same view of the run.
struct DisagreeError : Error {
  explicit DisagreeError(const std::string& message) : Error(ExitCode::disagree, message) {}
};
/// The library itself broke a contract.
struct InternalError : Error {
  explicit InternalError(const std::string& message) : Error(ExitCode::internal, message) {}
};

}  // namespace corank
