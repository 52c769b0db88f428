#pragma once
#include <string>

#include "trainer/methods/saved_adapter.h"

namespace corank {

class Storage;

/// A PEFT folder, a corank checkpoint folder, or an adapter.h5 file.
SavedAdapter read_adapter(const std::string& path);
/// adapter_config.json, adapter_model.safetensors and a model card, each written atomically; the method turns what a
/// checkpoint holds into what PEFT loads. ConfigError where the method has no such form.
void write_peft_folder(Storage& storage, const std::string& folder, SavedAdapter adapter);
/// The image of adapter.h5.
std::string adapter_h5_image(const SavedAdapter& adapter);

}  // namespace corank
