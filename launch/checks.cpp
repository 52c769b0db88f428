#include "launch/checks.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "comm/backends.h"
#include "trainer/adapter/adapter_file.h"
#include "trainer/adapter/methods.h"
#include "trainer/agree.h"

namespace corank {
namespace {

void check_layout(const RunConfig& run, int ranks) {
  const int64_t tensor = run.parallel.tensor;
  if (ranks % tensor != 0) {
    throw ConfigError(fmt::format(
        "parallel.tensor: {} does not divide the {} ranks of this job. Start a multiple of it.", tensor, ranks));
  }
  const int64_t data = ranks / tensor, rows = run.train.micro_batch_size * data;
  if (run.train.global_batch_size % rows != 0) {
    throw ConfigError(
        fmt::format("train.global_batch_size: {} is not a multiple of micro_batch_size {} x {} data-parallel "
                    "ranks.",
                    run.train.global_batch_size, run.train.micro_batch_size, data));
  }
}

/// A list entry that names no linear is a typing error that would silently train less.
void require_every_target(const AdapterConfig& adapter, const std::vector<std::string>& linears) {
  for (const std::string& name : adapter.target_modules.names) {
    AdapterConfig one = adapter;
    one.target_modules.names = {name};
    one.exclude_modules = {};
    select_targets(one, linears);
  }
}

int64_t check_tokens(const std::string& path, int64_t vocab_size) {
  if (path.empty()) return 0;
  const TokenFile file(path);
  file.validate(vocab_size);
  return file.size();
}

}  // namespace

int64_t total_steps(const RunConfig& run, const TokenFile& data) {
  if (run.train.max_steps) return *run.train.max_steps;
  const Loader loader(data, run.loader_options(0, 1));
  const double epochs = *run.train.num_train_epochs;
  int64_t steps = 0;
  for (int64_t epoch = 0; epoch < static_cast<int64_t>(epochs); ++epoch) steps += loader.steps_in_epoch(epoch);
  const double rest = epochs - std::floor(epochs);
  if (rest > 0) {
    const auto last = static_cast<double>(loader.steps_in_epoch(static_cast<int64_t>(epochs)));
    steps += static_cast<int64_t>(std::ceil(rest * last));
  }
  return std::max<int64_t>(1, steps);
}

CheckedInputs check_inputs(const RunConfig& run, int ranks) {
  check_layout(run, ranks);
  const std::string origin =
      run.model.path.empty() ? "model.shape " + run.model.shape : run.model.path + "/config.json";
  check_model_config(model_config_json(run.model), origin, static_cast<int>(run.parallel.tensor));
  Ledger ledger;
  const auto solo = make_solo_communicator(at::kCPU, ledger);
  const auto model = outline_model(run.model, *solo);
  CheckedInputs result;
  result.base_parameters = num_base_parameters(*model);
  std::vector<std::string> linears;
  for (const AdaptedLinear* linear : model->linears()) linears.push_back(linear->name());
  require_every_target(run.adapter, linears);
  AdapterConfig adapter = run.adapter;
  if (!adapter.path.empty()) {
    adapter = merge_with_file(adapter, run.adapter_keys, read_adapter(adapter.path).config, linears);
  }
  if (!make_method(adapter)->trains_base()) result.targets = select_targets(adapter, linears);
  result.train_samples = check_tokens(run.data.train, model->vocab_size());
  if (!run.data.train.empty() && (run.train.max_steps || run.train.num_train_epochs)) {
    adapter.adalora.total_step = total_steps(run, TokenFile(run.data.train));
    check_schedule(adapter);
  }
  result.eval_samples = check_tokens(run.data.eval, model->vocab_size());
  return result;
}

void check_inputs_together(const RunConfig& run, const World& world) {
  Ledger ledger;
  const auto all = make_communicator("mpi", world, ledger);
  on_rank_0(*all, [&] { check_inputs(run, world.size()); });
}

}  // namespace corank
