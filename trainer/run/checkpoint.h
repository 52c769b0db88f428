#pragma once
#include <map>
#include <optional>
#include <string>

#include "comm/gradient_sum.h"
#include "data/loader.h"
#include "trainer/files/adapter_file.h"
#include "trainer/methods/methods.h"
#include "trainer/run/checkpoint_folder.h"
#include "trainer/run/optimizer.h"

namespace corank {

class Storage;

/// Everything of a run that is neither an adapter tensor nor a moment. Random streams are counter-based and have no
/// state.
struct TrainingState {
  int64_t step = 0;  ///< optimizer steps done
  LoaderState loader;
};

/// What a checkpoint belongs to: checkpoints of another identity are never resumed.
struct RunIdentity {
  std::string hash;  ///< of everything that decides the result, layout excluded
  AdapterConfig adapter;
  std::string base_model;
  std::map<std::string, std::string> libraries = {};  ///< versions of what computes and stores, for the record
};

/// checkpoint-<step>/ with adapter.h5 (full tensors under PEFT's names), state.h5 (moments, position) and
/// manifest.json, written last: without a valid manifest a folder is not a checkpoint. Any number of ranks and any
/// tensor-parallel size can load it. Written through a Storage alone.
class Checkpoints {
 public:
  /// `folder` is output_dir. Borrows the storage, the mesh and what is saved.
  Checkpoints(Storage& storage, std::string folder, RunIdentity identity, Retention retention, const Mesh& mesh,
              ParameterStore& store, Optimizer& optimizer, GradientSum& sum, AdapterMethod& method);

  /// Collective over the world; rank 0 writes and reads back. Afterwards those that `retention` does not keep are
  /// removed. Returns the checkpoint's folder, on rank 0. Throws StorageError on every rank if rank 0 could not write.
  std::string save(const TrainingState& state);
  /// Collective over the world. newest_checkpoint() of output_dir, agreed by all ranks.
  std::optional<std::string> newest();
  /// Folders that the last newest() could not use, with the reason; known on rank 0.
  const std::vector<std::string>& passed_over() const { return passed_over_; }
  /// Collective over the world. Loads parameters, moments and the method's state from the folder, and begins the method
  /// anew. InputError or ConfigError (another run).
  TrainingState load(const std::string& path);
  /// Collective over the world. set_aside_beyond() `step`, where training starts; its lines are known on rank 0.
  std::vector<std::string> start_at(int64_t step);

 private:
  /// What is saved beside the parameters: flat buffers laid out like the masters.
  std::vector<std::pair<std::string, at::Tensor>> state_buffers();
  void write(const std::string& path, int64_t step, const std::string& adapter, const std::string& moments) const;
  /// Nothing half-written stays, e.g. on a full disk.
  void drop(const std::string& path) const;

  Storage& storage_;
  std::string folder_;
  RunIdentity identity_;
  Retention retention_;
  const Mesh& mesh_;
  ParameterStore& store_;
  Optimizer& optimizer_;
  GradientSum& sum_;
  AdapterMethod& method_;
  std::vector<std::string> passed_over_;
};

/// Collective over tp (full tensors of all parameters), for export.
SavedAdapter collect_adapter(const ParameterStore& store, const AdapterMethod& method, const RunIdentity& identity,
                             Communicator& tp);

}  // namespace corank
