#include "launch/plot.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <filesystem>

#include "configs/error.h"
#include "data/storage.h"

namespace corank {
namespace {

namespace fs = std::filesystem;

/// <checkout>/launch/plot of a binary <checkout>/build/<preset>/corank.
std::string script_path() {
  const fs::path checkout = fs::read_symlink("/proc/self/exe").parent_path().parent_path().parent_path();
  const fs::path script = checkout / "launch" / "plot";
  if (fs::exists(script)) return script.string();
  throw MissingError(
      fmt::format("--plot: {} draws the charts and is not there. Run the binary in its checkout.", script.string()));
}

/// Both ends of the child's standard input and output that are ours, and the child.
struct Child {
  int input = -1, output = -1;
  pid_t pid = -1;
};

std::array<int, 2> make_pipe() {
  std::array<int, 2> ends{};
  if (pipe2(ends.data(), O_CLOEXEC) == 0) return ends;
  throw InternalError(fmt::format("--plot: no pipe: {}.", std::strerror(errno)));
}

Child start(const std::string& script, const std::string& kind, const std::string& format) {
  const auto input = make_pipe(), output = make_pipe();
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, input[0], STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, output[1], STDOUT_FILENO);
  std::array<std::string, 3> words{script, kind, format};
  std::array<char*, 4> arguments{words[0].data(), words[1].data(), words[2].data(), nullptr};
  Child child{input[1], output[0]};
  const int error = posix_spawn(&child.pid, script.c_str(), &actions, nullptr, arguments.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  close(input[0]);
  close(output[1]);
  if (error == 0) return child;
  throw MissingError(fmt::format("--plot: {} cannot be started: {}.", script, std::strerror(error)));
}

/// As far as the child reads.
void feed(int input, const std::string& text) {
  for (size_t done = 0; done < text.size();) {
    const ssize_t count = write(input, text.data() + done, text.size() - done);
    if (count <= 0) break;
    done += static_cast<size_t>(count);
  }
  close(input);
}

std::string read_all(int output) {
  std::string bytes;
  std::array<char, 1 << 16> part{};
  for (ssize_t count = 0; (count = read(output, part.data(), part.size())) > 0;) {
    bytes.append(part.data(), static_cast<size_t>(count));
  }
  close(output);
  return bytes;
}

}  // namespace

void plot(Storage& storage, const std::string& kind, const std::string& json, const std::string& file) {
  const std::string extension = fs::path(file).extension().string();
  if (extension != ".png" && extension != ".svg" && extension != ".pdf") {
    throw ConfigError(fmt::format("--plot: {} ends with none of .png, .svg and .pdf.", file));
  }
  std::signal(SIGPIPE, SIG_IGN);  // a child that has ended says why by its code
  const Child child = start(script_path(), kind, extension.substr(1));
  feed(child.input, json);
  const std::string image = read_all(child.output);
  int status = 0;
  waitpid(child.pid, &status, 0);
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0 || image.empty()) {
    throw MissingError(fmt::format("--plot: {} was not drawn (see above).", file));
  }
  storage.write_file(file, image);
}

}  // namespace corank
