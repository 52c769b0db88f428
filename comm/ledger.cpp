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
    case Purpose::vocabulary_loss:
      return "vocabulary-loss";
    case Purpose::gradient_norm:
      return "gradient-norm";
    case Purpose::adapter_statistics:
      return "adapter-statistics";
    case Purpose::base_gathers:
      return "base-gathers";
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

int64_t ring_bytes(const Transfer& transfer, const Ring& ring) {
  const int64_t elements = transfer.elements;
  const int size = ring.size(), position = ring.position();
  if (size == 1) return 0;
  const auto sent = [&]() -> int64_t {
    switch (transfer.collective) {
      case Collective::all_reduce:  // all parts but its own, then all but its neighbour's
        return 2 * elements - ring_part(elements, position, size) - ring_part(elements, position + 1, size);
      case Collective::reduce_scatter:
        return elements / size * (size - 1);
      case Collective::all_gather:
        return elements * (size - 1);
      case Collective::broadcast:
        return ring.next() == transfer.root ? 0 : elements;
      case Collective::barrier:
      case Collective::split:
        return 0;
    }
    return 0;
  };
  return sent() * transfer.element_bytes;
}

std::string_view name(Link link) { return link == Link::inside_host ? "inside-host" : "between-hosts"; }

LinkBytes Traffic::over(Link link) const {
  const LinkBytes between{payload_between_hosts, sent_between_hosts};
  if (link == Link::between_hosts) return between;
  return {payload_bytes - between.payload, sent_bytes - between.sent};
}

Traffic& Traffic::operator+=(const Traffic& other) {
  calls += other.calls;
  payload_bytes += other.payload_bytes;
  sent_bytes += other.sent_bytes;
  seconds += other.seconds;
  payload_between_hosts += other.payload_between_hosts;
  sent_between_hosts += other.sent_between_hosts;
  return *this;
}

Traffic Traffic::operator-(const Traffic& other) const {
  return {calls - other.calls,
          payload_bytes - other.payload_bytes,
          sent_bytes - other.sent_bytes,
          seconds - other.seconds,
          payload_between_hosts - other.payload_between_hosts,
          sent_between_hosts - other.sent_between_hosts};
}

Traffic ring_traffic(const Transfer& transfer, const Ring& ring) {
  if (ring.size() == 1 || transfer.elements == 0) return {};
  const int64_t payload = transfer.payload_bytes(), sent = ring_bytes(transfer, ring);
  return {.calls = 1,
          .payload_bytes = payload,
          .sent_bytes = sent,
          .payload_between_hosts = ring.spans_hosts() ? payload : 0,
          .sent_between_hosts = ring.leaves_host() ? sent : 0};
}

}  // namespace corank
