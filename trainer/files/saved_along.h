#pragma once
#include <string>

#include "trainer/files/adapter_file.h"
#include "trainer/models/families.h"

namespace corank {

/// What saved_along() names, as PEFT loads it: in the place of the base's. `adapter` loses what `model`, of `options`,
/// has already, both compared in the dtype in which the model computes; anything else becomes an entry of
/// modules_to_save, and is trained if the adapter is. InputError, beginning with `origin`, for another shape and where
/// the model cannot hold it: embedding and head are one tied weight.
void place_saved_along(SavedAdapter& adapter, Model& model, const ModelOptions& options, const std::string& origin);

}  // namespace corank
