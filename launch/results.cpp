#include "launch/results.h"

#include <set>

#include "comm/agree.h"
#include "data/safetensors.h"
#include "data/storage.h"
#include "data/weight_file.h"

namespace corank {
namespace {

/// Weights in the run's dtype, and everything else of the base folder but its weights.
void write_model_folder(Storage& storage, const std::string& folder, const RunConfig& run, const SavedAdapter& weights,
                        const std::set<std::string>& transposed) {
  storage.make_folders(folder);
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const auto& [name, tensor] : weights.tensors) {
    tensors.emplace_back(name, (transposed.count(name) ? tensor.t() : tensor).to(run.model.dtype));
  }
  storage.write_file(folder + "/model.safetensors", safetensors_image(tensors));
  storage.write_file(folder + "/config.json", model_config_json(run.model));
  if (!run.model.path.empty()) copy_companions(storage, run.model.path, folder);
}

}  // namespace

std::string result_path(Session& session) {
  return session.run().output_dir + (session.method().trains_base() ? "/model" : "/adapter");
}

std::string write_result(Session& session, const RunIdentity& identity, Storage& storage) {
  const SavedAdapter result = collect_adapter(session.store(), session.method(), identity, session.mesh().tp());
  on_rank_0(session.mesh().world(), [&] {
    if (session.method().trains_base()) {
      write_model_folder(storage, result_path(session), session.run(), result, transposed_weights(session.model()));
    } else if (!session.method().beyond_peft().empty()) {
      storage.make_folders(result_path(session));
      storage.write_file(result_path(session) + "/adapter.h5", adapter_h5_image(result));
    } else {
      write_peft_folder(storage, result_path(session), result);
    }
  });
  return result_path(session);
}

}  // namespace corank
