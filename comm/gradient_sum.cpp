#include "comm/gradient_sum.h"

#include <utility>

#include "configs/error.h"

namespace corank {
namespace {

void require_flat_fp32(const at::Tensor& buffer, const char* part) {
  if (buffer.defined() && buffer.dim() == 1 && buffer.scalar_type() == at::kFloat && buffer.is_contiguous()) return;
  throw InternalError(std::string("The gradient buffer of part \"") + part + "\" is not a flat float32 tensor.");
}

}  // namespace

GradientSum::GradientSum(const Mesh& mesh, GradientBuffers buffers) : mesh_(mesh), buffers_(std::move(buffers)) {
  require_flat_fp32(buffers_.everywhere, "everywhere");
  require_flat_fp32(buffers_.data, "data");
  if (buffers_.purpose != Purpose::adapter_gradients && buffers_.purpose != Purpose::weight_gradients) {
    throw InternalError("Gradients are not summed for " + std::string(name(buffers_.purpose)) + ".");
  }
  if (buffers_.everywhere.numel() > 0) parts_.push_back({mesh.world(), buffers_.everywhere});
  if (buffers_.data.numel() > 0) parts_.push_back({mesh.dp(), buffers_.data});
}

const GradientSumEntry& gradient_sum(const std::string& name) {
  for (const GradientSumEntry* entry : {&plain_sum(), &bfloat16_sum(), &exact_sum()}) {
    if (entry->name == name) return *entry;
  }
  throw InternalError("There is no way to sum gradients named " + name + ".");
}

}  // namespace corank
