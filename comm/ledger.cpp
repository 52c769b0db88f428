#include "comm/ledger.h"

namespace corank {

std::string_view name(Purpose purpose) {
  switch (purpose) {
    case Purpose::adapter_gradients:
      return "adapter-gradients";
    case Purpose::weight_gradients:
      return "weight-gradients";
    case Purpose::tensor_activations:
      return "tensor-activations";
    case Purpose::base_gathers:
      return "base-gathers";
    case Purpose::vocabulary_loss:
      return "vocabulary-loss";
    case Purpose::gradient_norm:
      return "gradient-norm";
    case Purpose::adapter_statistics:
      return "adapter-statistics";
    case Purpose::data_control:
      return "data-control";
    case Purpose::checkpoint:
      return "checkpoint";
    case Purpose::startup:
      return "startup";
  }
  return "unknown";
}

std::string_view name(Collective collective) {
  switch (collective) {
    case Collective::all_reduce:
      return "all_reduce";
    case Collective::all_gather:
      return "all_gather";
    case Collective::reduce_scatter:
      return "reduce_scatter";
    case Collective::broadcast:
      return "broadcast";
    case Collective::barrier:
      return "barrier";
    case Collective::split:
      return "split";
  }
  return "unknown";
}

int64_t ring_bytes(Collective collective, int64_t payload, int size) {
  if (size == 1) return 0;
  const int64_t others = size - 1;
  switch (collective) {
    case Collective::all_reduce:
      return 2 * others * payload / size;
    case Collective::reduce_scatter:
      return others * payload / size;
    case Collective::all_gather:
      return others * payload;
    case Collective::broadcast:
      return payload;
    case Collective::barrier:
    case Collective::split:
      return 0;
  }
  return 0;
}

Traffic& Traffic::operator+=(const Traffic& other) {
  calls += other.calls;
  payload_bytes += other.payload_bytes;
  sent_bytes += other.sent_bytes;
  seconds += other.seconds;
  return *this;
}

Traffic Traffic::operator-(const Traffic& other) const {
  return {calls - other.calls, payload_bytes - other.payload_bytes, sent_bytes - other.sent_bytes,
          seconds - other.seconds};
}

}  // namespace corank
