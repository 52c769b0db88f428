#include "trainer/layers/dropout_keys.h"

#include "trainer/ops/dropout.h"
#include "trainer/ops/random.h"

namespace corank {

void DropoutKeys::begin(int64_t step) {
  step_ = step;
  const auto count = static_cast<int64_t>(keys_.size());
  if (count == 0) return;
  const at::Tensor host = at::empty({count}, at::TensorOptions(at::kLong).pinned_memory(device_.is_cuda()));
  const bool is_new = !all_.defined() || all_.numel() != count;
  if (is_new) all_ = at::empty({count}, at::TensorOptions(at::kLong).device(device_));
  int64_t i = 0;
  for (auto& [name, key] : keys_) {
    host.mutable_data_ptr<int64_t>()[i] =
        static_cast<int64_t>(ops::key_of(seed_, name.first, name.second, static_cast<uint64_t>(step_)));
    if (is_new) key = all_.narrow(0, i, 1);
    ++i;
  }
  all_.copy_(host, /*non_blocking=*/device_.is_cuda());
}

at::Tensor DropoutKeys::key(const std::string& kind, const std::string& place) {
  at::Tensor& key = keys_[{kind, place}];
  if (!key.defined()) {
    key = ops::dropout_key(ops::key_of(seed_, kind, place, static_cast<uint64_t>(step_)), device_);
  }
  return key;
}

}  // namespace corank
