#pragma once
#include <cstdint>
#include <vector>

namespace corank {

/// MoRA's own keys, and those of ReMoRA (arXiv 2405.12130): every `steps` optimizer steps MoRA's matrix is added to the
/// frozen weight and starts again at zero, under the next type.
struct MoraConfig {
  int64_t type = 1;            ///< ReMoRA: of the first span
  int64_t steps = 0;           ///< from one restart to the next; 0: none
  std::vector<int64_t> types;  ///< of each span, from the first again after the last; empty: no ReMoRA
  int64_t warmup_steps = 50;   ///< of the learning rate, after each restart
  int64_t merges = 0;          ///< restarts that a file holds
};

}  // namespace corank
