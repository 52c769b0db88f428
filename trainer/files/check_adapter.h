#pragma once
#include <string>

#include "trainer/methods/saved_adapter.h"

namespace corank {

/// InputError, naming `origin` and the tensor, unless the tensors are those that the adapter's own config describes,
/// complete and finite.
void check_adapter(const SavedAdapter& adapter, const std::string& origin);

}  // namespace corank
