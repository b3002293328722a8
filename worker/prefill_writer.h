// Streams a prompt's KV to the service, layer by layer, without ever blocking the engine.
//
// Put copies the layer's rows into the writer's own queue, in chunks, and returns; a thread of the
// writer sends them. What is queued or sent but not yet acknowledged is bounded by
// max_in_flight_bytes: a PutKv stream is acknowledged as a whole, so the thread ends it and starts
// the next one after a quarter of the bound, when it is idle, or when room is wanted. After a
// broken stream the thread reconnects to the same boot id and sends again what was not
// acknowledged; a second failure before any acknowledgement is the writer's error. Thread-safe but
// for Finish, after which nothing is put any more.
#ifndef CLUSTERKV_WORKER_PREFILL_WRITER_H_
#define CLUSTERKV_WORKER_PREFILL_WRITER_H_

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "worker/client.h"

namespace clusterkv::worker {

struct PrefillWriterOptions {
  int64_t chunk_bytes = 1 << 20;  // K and V together
  int64_t max_in_flight_bytes = 256 << 20;
  absl::Duration stream_timeout =
      absl::Minutes(2);  // of one PutKv stream; a stuck server is an error
  absl::Duration seal_timeout = absl::Minutes(10);  // of the clustering that Finish waits for
};

class PrefillWriter {
 public:
  // `sequence` as OpenSequence answered it. `client` outlives the writer.
  static absl::StatusOr<std::unique_ptr<PrefillWriter>> Create(
      Client* client, const v1::Sequence& sequence, const PrefillWriterOptions& options = {});
  ~PrefillWriter();  // cancels what is not sent

  // Enqueues tokens [first_token, first_token + tokens) of a layer: keys, values [tokens, kv_heads,
  // head_dim] of the sequence's element type, host memory, copied before this returns. query_rms
  // [kv_heads, head_dim] or empty. Never waits. Errors: InvalidArgument for rows that do not fit
  // the shape or can never fit the bound; ResourceExhausted when the queue is full (try again after
  // other layers are computed); the stream's error once it has broken for good.
  absl::Status Put(int64_t layer, int64_t first_token, int64_t tokens,
                   absl::Span<const std::byte> keys, absl::Span<const std::byte> values,
                   absl::Span<const float> query_rms);
  // The same, for callers that may wait until the queue has room. Errors: as Put, but that one.
  absl::Status PutWhenRoom(int64_t layer, int64_t first_token, int64_t tokens,
                           absl::Span<const std::byte> keys, absl::Span<const std::byte> values,
                           absl::Span<const float> query_rms);
  // Waits until the queue has room for `bytes` (for callers that may wait). Errors: InvalidArgument
  // when it never will; the stream's.
  absl::Status WaitForRoom(int64_t bytes);
  // Waits until all is sent and acknowledged, seals, answers the READY sequence. Errors: the
  // stream's; STALE_BOOT_ID when the server was restarted: the sequence is gone; the server's of
  // SealSequence.
  absl::StatusOr<v1::Sequence> Finish();
  absl::Status status() const;
  int64_t bytes_sent() const;  // of K and V, what was sent twice counted twice

 private:
  struct Impl;
  explicit PrefillWriter(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_PREFILL_WRITER_H_
