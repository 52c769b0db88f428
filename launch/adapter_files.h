#pragma once
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "trainer/files/adapter_file.h"
#include "trainer/files/plain_lora.h"

/// What the commands that turn adapter files into adapter files share.
namespace corank {

/// The adapter at `path`, complete and finite: InputError naming what is not; of a checkpoint the hashes too.
SavedAdapter read_checked(const std::string& path);

/// ConfigError where `output` is `input` itself or a checkpoint.
void refuse_own_input(const std::string& input, const std::string& output);
/// ConfigError where `file` is there and no adapter: only an earlier one is overwritten.
void refuse_foreign_file(const std::string& file);
/// ConfigError where `folder` holds something else than an earlier adapter: nothing is mixed with it.
void refuse_foreign_folder(const std::string& folder);

/// What --json says of an adapter written to `path`.
nlohmann::ordered_json summary(const std::string& path, const SavedAdapter& adapter);

/// The weights of model folder `folder`, after a check that `adapter` fits it; which loses what it saved along of them.
BaseWeights base_weights(const std::string& folder, SavedAdapter& adapter);

}  // namespace corank
