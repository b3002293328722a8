// Streams a prompt's KV to the service, layer by layer, without ever blocking the engine.
//
// Put copies the layer's rows into the writer's own queue (bounded by max_in_flight_bytes) and returns;
// a thread of the writer chunks and sends them. Not thread-safe but for status().
#ifndef CLUSTERKV_WORKER_PREFILL_WRITER_H_
#define CLUSTERKV_WORKER_PREFILL_WRITER_H_

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "worker/client.h"

namespace clusterkv::worker {

struct PrefillWriterOptions {
  int64_t chunk_bytes = 1 << 20;                 // K and V together
  int64_t max_in_flight_bytes = 256 << 20;
};

class PrefillWriter {
 public:
  // `sequence` as OpenSequence answered it. `client` outlives the writer.
  static absl::StatusOr<std::unique_ptr<PrefillWriter>> Create(
      Client* client, const v1::Sequence& sequence, const PrefillWriterOptions& options = {});
  ~PrefillWriter();  // cancels what is not sent

  // Enqueues tokens [first_token, first_token + tokens) of a layer: keys, values [tokens, kv_heads,
  // head_dim] of the sequence's element type, host memory, copied before this returns. query_rms
  // [kv_heads, head_dim] or empty. Never waits: Errors: ResourceExhausted when the queue is full (try
  // again after other layers are computed); the stream's error once it has broken.
  absl::Status Put(int64_t layer, int64_t first_token, int64_t tokens, absl::Span<const std::byte> keys,
                   absl::Span<const std::byte> values, absl::Span<const float> query_rms);
  // Waits until the queue has room for `bytes` (for callers that may wait). Errors: the stream's.
  absl::Status WaitForRoom(int64_t bytes);
  // Waits until all is sent and acknowledged, seals, answers the READY sequence. After a broken stream it
  // reconnects to the same boot id and resends what was not acknowledged, once.
  absl::StatusOr<v1::Sequence> Finish();
  absl::Status status() const;
  int64_t bytes_sent() const;

 private:
  struct Impl;
  explicit PrefillWriter(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_PREFILL_WRITER_H_
