#pragma once
#include "trainer/methods/methods.h"

namespace corank {

/// Collective over tp. Every adapted linear becomes the product with its merged weight, dense in the compute dtype and
/// rounded once: forward costs what the base costs, and quantised weights take the memory of dense ones. `store` holds
/// the method's parameters. Nothing can train until unmerge_adapter.
void merge_adapter(Model& model, const MethodExchange& method, const ParameterStore& store, Communicator& tp);
/// Collective over the mesh. The merged linears are made anew from the model's files, to the bit as they were, and
/// their adapters take part again.
void unmerge_adapter(Model& model, MethodTraining& method, const Mesh& mesh);

}  // namespace corank
