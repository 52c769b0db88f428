#pragma once
#include <cstdint>
#include <optional>

namespace corank {

/// PiSSA's own keys.
struct PissaConfig {
  std::optional<int64_t> niter;  ///< subspace iterations of a randomised decomposition; none: exact
  int64_t iterations = 1;        ///< rounds of decomposing what quantising the residual leaves (QPiSSA)
};

}  // namespace corank
