#include "trainer/methods/attach.h"

#include <set>

#include "trainer/layers/model.h"
#include "trainer/methods/targets.h"

namespace corank {

void attach_adapters(Model& model, const AdapterConfig& config, const MakeAdapter& make) {
  const std::vector<std::string> targets = select_targets(config, linear_names(model));
  const std::set<std::string> chosen(targets.begin(), targets.end());
  for (AdaptedLinear* linear : model.linears()) {
    if (chosen.count(linear->name())) linear->set_adapter(make(*linear));
  }
}

}  // namespace corank
