#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

/// The checkpoints of an output_dir as files: which are whole, which to go on from, which to remove. Nothing here
/// communicates; the trainer calls it on rank 0.
namespace corank {

class Storage;

/// What manifest.json says of a checkpoint.
struct Manifest {
  int64_t step = 0;
  std::string identity;  ///< of the run
  struct File {
    std::string name;
    int64_t bytes = 0;
    std::string sha256;
  };
  std::vector<File> files;
};

/// The text of manifest.json, with a hash over itself.
std::string manifest_json(const Manifest& manifest, const std::string& base_model,
                          const std::map<std::string, std::string>& libraries);

/// The manifest of a whole checkpoint: its own hash (older ones have none) and its files' hashes are right, and folder
/// name, manifest and state.h5 agree on step and run. nullopt, with the reason in `why`, otherwise.
std::optional<Manifest> verify_checkpoint(const std::string& path, std::string& why);

/// The newest whole checkpoint of `folder`; newer ones that are not whole are put into `passed_over` with the reason.
/// ConfigError if it belongs to another run. InputError if there are checkpoints and all are damaged; what a kill
/// during a first save left, folders without a manifest, is passed over.
std::optional<std::string> newest_checkpoint(const std::string& folder, const std::string& identity,
                                             std::vector<std::string>& passed_over);
/// The checkpoint at `path` as the run `identity` may resume it: MissingError, InputError or ConfigError otherwise.
void require_checkpoint(const std::string& path, const std::string& identity);

/// Where the checkpoint of `step` is to be written, free of what an interrupted save left there. What has a manifest is
/// set aside instead.
std::string free_checkpoint_path(Storage& storage, const std::string& folder, int64_t step);

/// Moves the checkpoints of `folder` beyond `step`, whole or damaged, into its folder set-aside, as
/// checkpoint-<step>.<n> where that name is taken: the run goes on below them, so they would be taken for its own. One
/// line for each. Folders without a manifest stay for the save that replaces them.
std::vector<std::string> set_aside_beyond(Storage& storage, const std::string& folder, int64_t step);

/// Which checkpoints stay.
struct Retention {
  int64_t limit = 3;      ///< the newest of the run
  std::string also = {};  ///< and this one, which is not counted: what `resume` names
};

/// Removes the oldest checkpoints of the run `identity` beyond what `retention` keeps; never the newest one, nor that
/// of step `just_written`. Only those count whose manifest is right and whose files have its sizes: what was just
/// written has been read back, so that the others need not be read for this. Whatever else is there stays. What cannot
/// be removed is warned of.
void prune_checkpoints(Storage& storage, const std::string& folder, const std::string& identity,
                       const Retention& retention, int64_t just_written);

/// Removes what interrupted writes of a run left in `folder`; what cannot be removed is warned of. Only while no other
/// process writes there.
void remove_leftovers(Storage& storage, const std::string& folder);

}  // namespace corank
