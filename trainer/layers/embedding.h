#pragma once
#include "comm/communicator.h"
#include "trainer/ops/weight.h"

namespace corank {

/// Collective over tp. Rows of a table split by vocabulary: weight_VD holds rows [offset, offset + V). tokens_N: int64.
/// Returns [N, D] in the table's dtype, equal on all tp ranks. A frozen table forms no gradient and keeps nothing.
at::Tensor embedding(const at::Tensor& tokens_N, const ops::Weight& weight_VD, int64_t offset, Communicator& tp);

/// Rows of a table that every rank holds whole (learned positions). rows_N: int64. Returns [N, D] in the table's dtype.
at::Tensor lookup(const at::Tensor& rows_N, const ops::Weight& table_PD);

}  // namespace corank
