#pragma once
#include <string>

#include "launch/session.h"

namespace corank {

/// output_dir/adapter (a PEFT folder), or output_dir/model (a Hugging Face folder) after full fine-tuning.
std::string result_path(Session& session);
/// Collective over the world. Writes it and returns the path.
std::string write_result(Session& session, const RunIdentity& identity, Storage& storage);

}  // namespace corank
