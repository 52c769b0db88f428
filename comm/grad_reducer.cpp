#include "comm/grad_reducer.h"

#include "configs/error.h"

namespace corank {
namespace {

void require_flat_fp32(const at::Tensor& buffer, const char* part) {
  if (buffer.defined() && buffer.dim() == 1 && buffer.scalar_type() == at::kFloat && buffer.is_contiguous()) return;
  throw InternalError(std::string("The gradient buffer of part \"") + part + "\" is not a flat float32 tensor.");
}

int64_t payload(const Communicator& group, const at::Tensor& buffer) {
  return group.size() > 1 ? static_cast<int64_t>(buffer.nbytes()) : 0;
}

}  // namespace

GradReducer::GradReducer(const Mesh& mesh, at::Tensor everywhere, at::Tensor data, Purpose purpose)
    : mesh_(mesh), everywhere_(std::move(everywhere)), data_(std::move(data)), purpose_(purpose) {
  require_flat_fp32(everywhere_, "everywhere");
  require_flat_fp32(data_, "data");
  if (purpose_ != Purpose::adapter_gradients && purpose_ != Purpose::weight_gradients) {
    throw InternalError("Gradients are not reduced for " + std::string(name(purpose_)) + ".");
  }
}

// An empty part is skipped, so that it costs no latency; the parts are equally long on all ranks of their groups.
void GradReducer::reduce() {
  if (everywhere_.numel() > 0) mesh_.world().all_reduce(everywhere_, ReduceOp::sum, purpose_);
  if (data_.numel() > 0) mesh_.dp().all_reduce(data_, ReduceOp::sum, purpose_);
}

int64_t GradReducer::payload_bytes() const { return payload(mesh_.world(), everywhere_) + payload(mesh_.dp(), data_); }

}  // namespace corank
