#include "trainer/ops/side_stream.h"

#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace corank::ops {

SideStream::Ticket SideStream::run(const std::function<void()>& work) {
  if (device_.is_cpu()) {
    work();
    return nullptr;
  }
  const c10::impl::VirtualGuardImpl device(device_.type());
  if (!stream_) stream_ = device.getStreamFromGlobalPool(device_);
  c10::Event before(device_.type());
  before.record(device.getStream(device_));
  before.block(*stream_);
  const c10::StreamGuard guard(*stream_);
  work();
  auto ticket = std::make_shared<c10::Event>(device_.type());
  ticket->record(*stream_);
  return ticket;
}

void SideStream::wait(const Ticket& ticket) const {
  if (ticket) ticket->block(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
}

}  // namespace corank::ops
