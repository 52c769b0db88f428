#pragma once
#include <functional>
#include <memory>

#include "trainer/layers/adapted_linear.h"
#include "trainer/methods/config.h"

namespace corank {

class Model;

using MakeAdapter = std::function<std::unique_ptr<Adapter>(AdaptedLinear& linear)>;

/// Gives an adapter to every linear of the model that the config targets. ConfigError if none matches.
void attach_adapters(Model& model, const AdapterConfig& config, const MakeAdapter& make);

}  // namespace corank
