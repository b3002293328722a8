// The worker's talk about a group (ConnectResident, cache_service.proto): attached sequences whose
// steps the service's GPU answers by itself, into memory of this worker's GPU.
//
// Not thread-safe. When it dies the service writes no more; the window may be freed after it.
#ifndef CLUSTERKV_WORKER_RESIDENT_LINK_H_
#define CLUSTERKV_WORKER_RESIDENT_LINK_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "worker/decode_session.h"

namespace clusterkv::worker {

class ResidentLink {
 public:
  struct Offer {
    v1::PeerWindow window;  // of this worker: handle and bytes
    uint32_t slots = 0, max_exact_tokens = 0;
  };

  // Sequences of one server, which outlive it, in the order of a step's pairs. Errors: Unavailable,
  // with the service's reason, when there is no group to be had; as the service's.
  static absl::StatusOr<std::unique_ptr<ResidentLink>> Connect(
      absl::Span<DecodeSession* const> sessions, const Offer& offer);
  ~ResidentLink();

  // The service's window: handle and bytes.
  const v1::PeerWindow& requests() const { return answer_.requests(); }
  // Tokens from here on are the worker's, by layer and sequence: [layers, sequences].
  const std::vector<uint32_t>& window_begin() const { return window_begin_; }
  // Between two steps, when all of `rounds` are answered: what was clustered meanwhile is the
  // service's from the next one on. Errors: as the service's; after one there is no group any more.
  absl::Status Renew(uint64_t rounds);

 private:
  explicit ResidentLink(Client* client) : client_(*client) {}

  Client& client_;
  v1::ConnectResidentResponse answer_;
  std::vector<uint32_t> window_begin_;
};

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_RESIDENT_LINK_H_
