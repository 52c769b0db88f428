#pragma once
#include <string>

#include "trainer/files/adapter_file.h"
#include "trainer/models/families.h"

namespace corank {

/// What a merged folder holds.
struct MergeResult {
  int64_t merged = 0;    ///< linears that the adapter changed
  int64_t replaced = 0;  ///< tensors of modules_to_save
  int64_t tensors = 0, bytes = 0;
};

/// Base + adapter as a Hugging Face folder, file by file and tensor by tensor as the base has them: names, shards,
/// types and everything beside the weights stay. Merged weights are computed in float32 and rounded once. Holds one
/// tensor at a time, beside the adapter.
///
/// `dequantize`: the base is what model.quantization makes of the files, the weights that the adapter was trained on;
/// they are written in the run's dtype. Otherwise it is what the files hold, which for a folder quantised by
/// bitsandbytes is a ConfigError.
///
/// InputError if the adapter does not fit the model, or a result is not finite. `folder` is an existing folder.
MergeResult write_merged_model(Storage& storage, const std::string& folder, const ModelOptions& options,
                               const SavedAdapter& adapter, bool dequantize);

}  // namespace corank
