#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "comm/ring.h"

namespace corank {

/// What a collective is for. Every byte is counted under one of these.
enum class Purpose {
  adapter_gradients,   ///< sum of adapter gradients, once a step
  weight_gradients,    ///< the same where base weights train (full fine-tuning)
  tensor_activations,  ///< activations and their gradients between tensor-parallel ranks
  vocabulary_loss,     ///< softmax statistics of the vocabulary-parallel cross entropy
  gradient_norm,       ///< squares of sharded gradients
  adapter_statistics,  ///< what a method sums beside gradients: DoRA's norms, AdaLoRA's Gram matrices and scores
  base_gathers,        ///< weights gathered from the data-parallel ranks that share them
  data_control,        ///< token counts, losses
  checkpoint,          ///< shards gathered for a save
  startup,             ///< agreement and rendezvous before the first step, the sum of counts after the last
};
inline constexpr int kNumPurposes = 10;

/// "adapter-gradients", ...: the names in metrics, tables and JSON.
std::string_view name(Purpose purpose);

enum class Collective { all_reduce, all_gather, reduce_scatter, broadcast, barrier, split };

/// "all_reduce", ...: the names in messages and tables.
std::string_view name(Collective collective);

/// A collective as far as bytes go. Its elements are what a rank hands in: the whole tensor for all_reduce, broadcast
/// and reduce_scatter, its own part for all_gather.
struct Transfer {
  Collective collective = Collective::all_reduce;
  int64_t elements = 0, element_bytes = 0;
  int root = 0;  ///< of broadcast

  int64_t payload_bytes() const { return elements * element_bytes; }
};

/// Bytes that the rank of `ring` sends to its neighbour. Of S bytes over n ranks: all_reduce 2(n-1)/n S, where parts of
/// unequal length differ by one element; reduce_scatter (n-1)/n S; all_gather (n-1) S; broadcast S, but nothing from
/// the last rank before the root; barrier and split 0. Nothing is sent in a group of one. MPI ranks send exactly this
/// (mpi_communicator.cpp). NCCL chooses between rings and trees by size and topology: its bytes are counted as if it
/// took this ring.
int64_t ring_bytes(const Transfer& transfer, const Ring& ring);

/// What bytes go over.
enum class Link { inside_host, between_hosts };
inline constexpr std::array kLinks{Link::inside_host, Link::between_hosts};

/// "inside-host", "between-hosts".
std::string_view name(Link link);

struct LinkBytes {
  int64_t payload = 0;  ///< handed to groups inside a host, or to groups that span hosts
  int64_t sent = 0;     ///< to a rank on this host, or on another one

  bool operator==(const LinkBytes&) const = default;
};

struct Traffic {
  int64_t calls = 0;
  int64_t payload_bytes = 0;          ///< what this rank handed to collectives of more than one rank
  int64_t sent_bytes = 0;             ///< what the algorithm makes this rank send (ring_bytes)
  double seconds = 0;                 ///< time inside the collectives; on CUDA only while timing is on
  int64_t payload_between_hosts = 0;  ///< of payload_bytes: handed to groups that span hosts
  int64_t sent_between_hosts = 0;     ///< of sent_bytes: to a rank on another host

  LinkBytes over(Link link) const;

  Traffic& operator+=(const Traffic& other);
  Traffic operator-(const Traffic& other) const;
  bool operator==(const Traffic&) const = default;
};

/// One call of `transfer` by the rank of `ring`, without its time: what is counted, and what is predicted. A group of
/// one counts nothing, nor does an empty tensor, which is not sent.
Traffic ring_traffic(const Transfer& transfer, const Ring& ring);

/// Traffic of this rank by purpose. One Ledger serves all communicators of a run; it outlives them. Not thread-safe:
/// one host thread issues all collectives.
class Ledger {
 public:
  using Snapshot = std::array<Traffic, kNumPurposes>;

  void record(Purpose purpose, const Traffic& traffic) { totals_[static_cast<size_t>(purpose)] += traffic; }
  const Traffic& at(Purpose purpose) const { return totals_[static_cast<size_t>(purpose)]; }
  const Snapshot& snapshot() const { return totals_; }

  /// While on, CUDA communicators synchronise around each collective to time it: for `bench comm`, never for training.
  void set_timing(bool on) { timing_ = on; }
  bool timing() const { return timing_; }

 private:
  Snapshot totals_{};
  bool timing_ = false;
};

}  // namespace corank
