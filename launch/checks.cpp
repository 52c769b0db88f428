#include "launch/checks.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <optional>
#include <sstream>

#include "comm/agree.h"
#include "comm/backends.h"
#include "data/file.h"
#include "data/tokenizer_identity.h"
#include "launch/session.h"
#include "trainer/files/adapter_file.h"
#include "trainer/methods/methods.h"
#include "trainer/methods/start.h"
#include "trainer/methods/targets.h"

namespace corank {
namespace {

void check_ranks(const RunConfig& run, int ranks) {
  const int64_t tensor = run.parallel.tensor;
  if (ranks % tensor != 0) {
    throw ConfigError(fmt::format(
        "parallel.tensor: {} does not divide the {} ranks of this job. Start a multiple of it.", tensor, ranks));
  }
}

void check_batch(const RunConfig& run, int ranks) {
  const int64_t data = run.train.reproducible ? 1 : ranks / run.parallel.tensor;  // slots may divide unevenly
  const int64_t rows = run.train.micro_batch_size * data;
  if (run.train.global_batch_size % rows != 0) {
    throw ConfigError(
        fmt::format("train.global_batch_size: {} is not a multiple of micro_batch_size {} x {} data-parallel "
                    "ranks.",
                    run.train.global_batch_size, run.train.micro_batch_size, data));
  }
}

namespace fs = std::filesystem;

constexpr int64_t kMaxRunFileBytes = int64_t{1} << 20;

/// A list entry that names no linear is a typing error that would silently train less.
void require_every_target(const AdapterConfig& adapter, const ModuleNames& modules) {
  for (const std::string& name : adapter.target_modules.names) {
    AdapterConfig one = adapter;
    one.target_modules.names = {name};
    one.exclude_modules = {};
    require_only_linears(one, modules.others);
    select_targets(one, modules.linears);
  }
}

/// The number of samples that a token file has for the run; 0 without a file.
int64_t check_tokens(const RunConfig& run, const std::string& path, int64_t vocab_size) {
  if (path.empty()) return 0;
  const TokenFile file(path);
  if (!run.model.path.empty()) require_same_tokenizer(file, run.model.path, vocab_size);
  file.validate(vocab_size);
  const int64_t used = Sampler(file, run.loader_options(0, 1).sampler).num_used();
  if (used > 0) return used;
  throw InputError(fmt::format("{}: no target is left once samples are cut to data.seq_len {}. Raise data.seq_len.",
                               path, run.data.seq_len));
}

/// The run's adapter on the outline of its model; that of adapter.path with its tensors' names and shapes.
AdapterConfig check_adapter_fits(const RunConfig& run, Model& model) {
  std::optional<SavedAdapter> file;
  AdapterConfig adapter = run.adapter;
  if (!adapter.path.empty()) {
    file = read_run_adapter(run, model);
    adapter = file->config;
  }
  const auto method = make_method(adapter);
  if (method->trains_base()) return adapter;
  ParameterStore store;
  register_parameters(*method, model, store, 0);
  if (file) check_fits(*method, *file, store);
  return adapter;
}

/// Architecture, split, names and shapes of all tensors, targets, the adapter at adapter.path.
CheckedInputs check_model(const RunConfig& run) {
  const std::string origin =
      run.model.path.empty() ? "model.shape " + run.model.shape : run.model.path + "/config.json";
  check_model_config(model_config_json(run.model), origin, static_cast<int>(run.parallel.tensor));
  Ledger ledger;
  const auto tp = make_outline_communicator(static_cast<int>(run.parallel.tensor), ledger);
  const auto model = outline_model(run.model, *tp);
  CheckedInputs result;
  result.base_parameters = num_base_parameters(*model);
  result.vocab_size = model->vocab_size();
  const ModuleNames modules = module_names(*model);
  require_every_target(run.adapter, modules);
  result.adapter = check_adapter_fits(run, *model);
  require_every_entry(run.adapter, modules.linears);
  if (!make_method(result.adapter)->trains_base()) result.targets = select_targets(result.adapter, modules.linears);
  return result;
}

/// What training starts from.
void check_start(const RunConfig& run) {
  check_format(run.adapter, run.model.quantization, [&](const std::string& key, const std::string& message) {
    throw ConfigError(fmt::format("{}: adapter.{}: {}.", run.file, key, message));
  });
}

void require_complete(const RunConfig& run) {
  if (run.data.train.empty())
    throw ConfigError(run.file + ": data.train: names no token file. Make one with data/prepare.");
  if (run.output_dir.empty()) throw ConfigError(run.file + ": output_dir is missing.");
  if (!run.train.max_steps && !run.train.num_train_epochs) {
    throw ConfigError(run.file + ": train.max_steps or train.num_train_epochs is missing.");
  }
  if (run.eval_steps > 0 && run.data.eval.empty()) {
    throw ConfigError(run.file + ": eval_steps: set, but data.eval names no token file.");
  }
}

/// Settings of this run that the run.yaml of another does not hold, for a message.
std::string differing(const RunConfig& run, const std::string& other) {
  std::vector<std::string> lines;
  std::istringstream settings(run.result_settings());
  for (std::string line; std::getline(settings, line);) {
    if (other.find("\n" + line + "\n") == std::string::npos) lines.push_back(line.substr(line.find_first_not_of(' ')));
  }
  return lines.empty() ? "other data or another model" : fmt::format("now {}", fmt::join(lines, ", "));
}

/// The folder itself, or the one in which it would be made.
void require_writable(const std::string& folder) {
  fs::path place = fs::absolute(folder);
  while (!fs::exists(place) && place.has_relative_path()) place = place.parent_path();
  if (fs::is_directory(place) && ::access(place.c_str(), W_OK | X_OK) == 0) return;
  throw StorageError(
      fmt::format("output_dir: {}: {} is no folder that can be written. Choose another output_dir or change its "
                  "permissions.",
                  folder, place.string()));
}

void check_resume(const RunConfig& run, const RunIdentity& identity) {
  std::vector<std::string> passed_over;
  if (run.resume == "auto") {
    newest_checkpoint(run.output_dir, identity.hash, passed_over);
  } else if (run.resume != "never") {
    require_checkpoint(run.resume, identity.hash);
  }
}

CheckedInputs check_files(const RunConfig& run, int ranks) {
  require_complete(run);
  CheckedInputs result = check_bench(run, ranks);
  result.eval_samples = check_tokens(run, run.data.eval, result.vocab_size);
  return result;
}

/// The number of steps and what depends on it.
void check_steps(const RunConfig& run, const TokenFile& data, CheckedInputs& result) {
  const int64_t steps = total_steps(run, data);
  set_total_steps(result.adapter, steps);
  check_schedule(result.adapter, steps);
}

}  // namespace

int64_t total_steps(const RunConfig& run, const TokenFile& data) {
  if (run.train.max_steps) return *run.train.max_steps;
  const Loader loader(data, run.loader_options(0, 1));
  const auto epochs = static_cast<int64_t>(*run.train.num_train_epochs);
  int64_t steps = 0;
  if (run.data.packing) {
    for (int64_t epoch = 0; epoch < epochs; ++epoch) steps += loader.steps_in_epoch(epoch);
  } else {
    steps = epochs * loader.steps_in_epoch(0);
  }
  const double rest = *run.train.num_train_epochs - static_cast<double>(epochs);
  if (rest > 0) steps += static_cast<int64_t>(std::ceil(rest * static_cast<double>(loader.steps_in_epoch(epochs))));
  return std::max<int64_t>(1, steps);
}

CheckedInputs check_evaluation(const RunConfig& run, int ranks) {
  if (run.data.eval.empty()) throw ConfigError(run.file + ": data.eval: names no token file.");
  check_ranks(run, ranks);
  CheckedInputs result = check_model(run);
  result.eval_samples = check_tokens(run, run.data.eval, result.vocab_size);
  return result;
}

CheckedInputs check_plan(const RunConfig& run, int ranks) {
  check_ranks(run, ranks);
  check_batch(run, ranks);
  check_start(run);
  return check_model(run);
}

CheckedInputs check_bench(const RunConfig& run, int ranks) {
  CheckedInputs result = check_plan(run, ranks);
  result.train_samples = check_tokens(run, run.data.train, result.vocab_size);
  return result;
}

CheckedInputs check_training_inputs(const RunConfig& run, int ranks) {
  CheckedInputs result = check_files(run, ranks);
  check_steps(run, TokenFile(run.data.train), result);
  return result;
}

CheckedInputs check_training(const RunConfig& run, int ranks) {
  CheckedInputs result = check_files(run, ranks);
  const TokenFile data(run.data.train);
  check_steps(run, data, result);
  RunConfig merged = run;
  merged.adapter = result.adapter;
  require_writable(run.output_dir);
  const RunIdentity identity = identity_of(merged, data);
  check_output(merged, identity);
  check_resume(run, identity);
  return result;
}

void check_together(RunCheck first, RunCheck elsewhere, const RunConfig& run, const World& world) {
  Ledger ledger;
  const auto all = make_communicator("mpi", world, ledger);
  on_each_rank(*all, [&] {
    if (world.local_rank() == 0) (world.rank() == 0 ? first : elsewhere)(run, world.size());
  });
}

std::string identity_line(const RunIdentity& identity) { return "# identity: " + identity.hash + "\n"; }

void check_output(const RunConfig& run, const RunIdentity& identity) {
  const std::string path = run.output_dir + "/run.yaml";
  if (!fs::exists(path)) return;
  const std::string other = read_file(path, kMaxRunFileBytes);
  if (other.starts_with(identity_line(identity))) return;
  if (!other.starts_with("# identity: ")) {
    throw ConfigError(
        fmt::format("output_dir: {} does not say which run it is of; it is damaged, or another program's. Remove that "
                    "file alone if "
                    "the folder is this run's: its checkpoints say for themselves what they belong to.",
                    path));
  }
  throw ConfigError(
      fmt::format("output_dir: {} holds another run ({}; its settings are in run.yaml). Choose another output_dir or "
                  "remove it; to train on from its result, name that in adapter.path.",
                  run.output_dir, differing(run, other)));
}

}  // namespace corank
