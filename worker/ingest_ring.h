// Slots in GPU memory through which a prompt's rows go to a service on this host.
//
// Slot i lies at i * slot_bytes(): its first half holds keys, its second half values, both packed.
// The service maps the memory (ConnectIngest) and reads a slot when it is told to (PutWindow). Who
// uses a slot, and when, is the caller's business; calls on different slots may run at once.
#ifndef CLUSTERKV_WORKER_INGEST_RING_H_
#define CLUSTERKV_WORKER_INGEST_RING_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace clusterkv::worker {

using EngineStream = void*;  // a cudaStream_t; null where pointers are the host's

// Rows of some tokens: row (token, head) at data + token * token_stride + head * head_stride.
struct EngineRows {
  const void* data = nullptr;
  int64_t tokens = 0, heads = 0;
  int64_t row_bytes = 0;  // of one token and head, dense
  int64_t token_stride_bytes = 0, head_stride_bytes = 0;
};

class IngestRing {
 public:
  virtual ~IngestRing() = default;

  virtual int slots() const = 0;
  virtual int64_t slot_bytes() const = 0;  // a multiple of 512
  // The handle that ConnectIngest takes. Errors: Unavailable where the memory cannot be shared.
  virtual absl::StatusOr<std::string> Export() const = 0;
  // Packs the rows into the slot when `stream` comes to it. REQUIRES: keys and values have the same
  // tokens, heads and row_bytes, and fit its halves. Errors: what could not be launched.
  virtual absl::Status Pack(int slot, const EngineRows& keys, const EngineRows& values,
                            EngineStream stream) = 0;
  // Waits until the slot is packed; the rows' hash (RowsHash). Errors: what the stream met.
  virtual absl::StatusOr<uint64_t> AwaitPacked(int slot) = 0;
  // Copies [bytes] of the slot's keys and of its values to host memory. Errors: as AwaitPacked.
  virtual absl::Status Read(int slot, int64_t bytes, std::byte* keys, std::byte* values) = 0;
};

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_INGEST_RING_H_
