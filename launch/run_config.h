#pragma once
#include <optional>
#include <string>
#include <vector>

#include "data/loader.h"
#include "trainer/methods/config.h"
#include "trainer/models/families.h"
#include "trainer/run/checkpoint.h"
#include "trainer/run/optimizer.h"
#include "trainer/run/schedule.h"

namespace corank {

struct DataConfig {
  std::string train, eval;  ///< token files; empty where the run file names none
  int64_t seq_len = 1024;
  bool packing = true;
  bool shuffle = true;
};

struct ParallelConfig {
  int64_t tensor = 1;
  std::string backend;              ///< resolved: mpi or nccl
  std::string shard_base = "none";  ///< one of shard_base_names()
};

struct TrainConfig {
  std::optional<int64_t> max_steps;
  std::optional<double> num_train_epochs;
  int64_t global_batch_size = 8;
  int64_t micro_batch_size = 1;
  double learning_rate = 2e-4;
  std::string lr_scheduler_type = "cosine";
  std::optional<int64_t> warmup_steps;
  std::optional<double> warmup_ratio;
  OptimizerOptions optimizer;
  double max_grad_norm = 1.0;
  int64_t seed = 42;
};

/// A whole run as plain structs, valid after construction: every key read, checked for itself and against the others.
struct RunConfig {
  std::string file;  ///< where it was read
  ModelOptions model;
  AdapterConfig adapter;
  std::vector<std::string> adapter_keys;  ///< keys that the run file writes in its adapter section
  DataConfig data;
  ParallelConfig parallel;
  TrainConfig train;
  std::string output_dir;
  int64_t logging_steps = 1;
  int64_t eval_steps = 0;
  int64_t save_steps = 0;
  int64_t save_total_limit = 3;
  std::string resume = "auto";

  LoaderOptions loader_options(int dp_rank, int dp_size) const;
  Schedule schedule(int64_t total_steps) const;
  /// The resolved run as YAML, every default written out; reading it gives this run again.
  std::string yaml() const;
  /// The settings that decide the result: the run's part of its identity. Layout, places of files and logging are not
  /// in it.
  std::string result_settings() const;
};

/// What checkpoints of `run`, its adapter merged with adapter.path, on `data` belong to.
RunIdentity identity_of(const RunConfig& run, const TokenFile& data);

/// Its value of train.activation_checkpointing.
std::string name_of(Checkpointing checkpointing);

/// Reads a run file with overrides. ConfigError with file, line and key.
RunConfig read_run(const std::string& path, const std::vector<std::string>& overrides);

}  // namespace corank
