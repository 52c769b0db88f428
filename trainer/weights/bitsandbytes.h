#pragma once
#include <optional>
#include <string>
#include <vector>

#include "data/weight_file.h"
#include "trainer/ops/quantize.h"

/// Hugging Face folders whose linears bitsandbytes quantised to NF4 (methods 6.6): codes and statistics are taken as
/// they are.
namespace corank {

/// Whether the files hold a weight of that kind.
bool holds_bitsandbytes_nf4(const WeightFile& file);
/// Weight `name` of full shape [O, I]; marks its tensors as used. `outline`: shapes only. InputError if a part is
/// missing or is not what this reader takes.
ops::Nf4 read_bitsandbytes_nf4(WeightFile& file, const std::string& name, const std::vector<int64_t>& shape,
                               bool outline);

}  // namespace corank
