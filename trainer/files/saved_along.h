#pragma once
#include <string>
#include <vector>

#include "trainer/methods/saved_adapter.h"
#include "trainer/models/families.h"

namespace corank {

/// Whether a module of an adapter's file is an embedding or a head, by its last part, of any family.
bool is_of_vocabulary(const std::string& module);

/// Embedding and head that stand beside the adapter and not in modules_to_save, by their full names: PEFT
/// saves them along where the vocabulary was resized, or when told to.
std::vector<std::string> saved_along(const SavedAdapter& adapter);

/// What saved_along() names, as PEFT loads it: in the place of the base's. `adapter` loses what `model`, of `options`,
/// has already, both compared in the dtype in which the model computes; anything else becomes an entry of
/// modules_to_save, and is trained if the adapter is. InputError, beginning with `origin`, for another shape and where
/// the model cannot hold it: embedding and head are one tied weight.
void place_saved_along(SavedAdapter& adapter, Model& model, const ModelOptions& options, const std::string& origin);

}  // namespace corank
