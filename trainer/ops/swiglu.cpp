#include "trainer/ops/swiglu.h"

#include <torch/csrc/autograd/custom_function.h>

#include "trainer/ops/cuda.h"
#include "trainer/ops/wide.h"

namespace corank::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct SwiGlu : torch::autograd::Function<SwiGlu> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate, const at::Tensor& up) {
    ctx->save_for_backward({gate, up});
    if (gate.is_cuda() && cuda::has_kernel(gate)) return cuda::swiglu_forward(gate, up);
    return at::silu(wide(gate)).mul_(up).to(gate.scalar_type());
  }

  /// With s = sigmoid(gate): dup = g gate s, dgate = g up s (1 + gate (1 - s)).
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    if (saved[0].is_cuda() && cuda::has_kernel(saved[0])) {
      auto [dgate, dup] = cuda::swiglu_backward(grads[0].contiguous(), saved[0], saved[1]);
      return {dgate, dup};
    }
    const at::Tensor g = wide(grads[0]), gate = wide(saved[0]), up = wide(saved[1]);
    const at::Tensor s = at::sigmoid(gate);
    at::Tensor dgate = (1 - s).mul_(gate).add_(1).mul_(s).mul_(up).mul_(g);
    at::Tensor dup = s.mul_(gate).mul_(g);
    return {dgate.to(saved[0].scalar_type()), dup.to(saved[0].scalar_type())};
  }
};

}  // namespace

at::Tensor swiglu(const at::Tensor& gate_NF, const at::Tensor& up_NF) { return SwiGlu::apply(gate_NF, up_NF); }

}  // namespace corank::ops
