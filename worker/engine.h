// What an inference engine calls: KV of its layers in, attention output of its layers out, on its
// own pointers and its own stream.
//
//   prefill   Create, Ingest each layer, Seal
//   decode    Attach, and per token and layer: Append its K and V, Step its queries; at the end
//             Close, or Release, which gives the memory back
//
// Pointers are of EngineOptions::device: host memory with a null stream ("cpu"), or a GPU's with
// the caller's stream (engine_device.h). clusterkv.h is the same for plain C.
//
// A sequence's calls come from one thread at a time and, on a GPU, on one stream or on streams that
// the caller has put in order. Calls on different sequences may run at once. What does not say that
// it waits does not: neither for the service nor for the stream; a thread of the engine (the same
// one for all calls on a sequence) does the talking.
//
// Failures. With host memory Step and Append return their own. On a GPU they are known later: the
// output concerned is then all zeros, and the sequence's next call returns the first failure that
// was not told yet. Wait asks for it. The sequence goes on after a failure that may pass
// (Unavailable, DeadlineExceeded, ResourceExhausted); others stay: STALE_BOOT_ID,
// SEQUENCE_NOT_FOUND, SEQUENCE_RELEASED want a prefill, and a decoded token that could not be
// appended on a GPU is lost to the sequence, whose every later call returns that failure. So is a
// GPU that failed (INTERNAL_ERROR): nothing waits for its streams any more, and no call on it
// succeeds in this process; what was appended before is still sent by Close.
#ifndef CLUSTERKV_WORKER_ENGINE_H_
#define CLUSTERKV_WORKER_ENGINE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "worker/client.h"
#include "worker/decode_session.h"
#include "worker/engine_device.h"
#include "worker/prefill_writer.h"
#include "worker/window_writer.h"

namespace clusterkv::worker {

struct EngineOptions {
  std::string target;  // "host:port" or "unix:path"; of several shards some or all, by commas
  ClientOptions client;
  std::string device = "cpu";  // whose the pointers are: "cpu", "cuda", "cuda:N"
  DecodeOptions decode;        // `device` is set by the engine; on a GPU `links` without NCCL
  PrefillWriterOptions prefill;
  v1::ElementType output_type = v1::ELEMENT_TYPE_FLOAT32;  // of what Step writes
  int threads = 4;  // that talk to the service; sequences are shared out among them
  // Of rows on a GPU, where a server on this host can read them there (window_writer.h).
  IngestRingOptions ingest_ring;
  // Rows that were ingested and not yet taken over by a sequence's prefill, at most.
  int64_t staging_bytes = 512 << 20;
  // How long a GPU's stream waits for an answer before it goes on with zeros. Longer than what the
  // recovery of a lost connection may take.
  absl::Duration step_timeout = absl::Seconds(120);
};

class EngineSequence;

// K and V [tokens, kv_heads, head_dim] of the sequence's element type; strides in bytes, 0: dense.
struct EngineKv {
  const void* keys = nullptr;
  const void* values = nullptr;
  int64_t token_stride_bytes = 0;
  int64_t head_stride_bytes = 0;
};

// One sequence of a batch.
struct EngineStep {
  EngineSequence* sequence = nullptr;
  const void* queries = nullptr;   // [query_heads, head_dim] of the element type, dense
  void* output = nullptr;          // [query_heads, head_dim] of the output type
  absl::Status* status = nullptr;  // may be null; host memory: the sequence's own
};
struct EngineAppend {
  EngineSequence* sequence = nullptr;
  EngineKv kv;  // of one token
};

class Engine {
 public:
  // Connects. Errors: as Shards::Connect and MakeEngineDevice; InvalidArgument for options.
  static absl::StatusOr<std::unique_ptr<Engine>> Open(const EngineOptions& options);
  // The same on another device than options.device says.
  static absl::StatusOr<std::unique_ptr<Engine>> Open(const EngineOptions& options,
                                                      std::unique_ptr<EngineDevice> device);
  // Closes what is open. On a GPU: after the streams that it was given have done their work.
  ~Engine();

  // ---- prefill
  // Opens a sequence to be filled; request.session_id is set. Waits for the service.
  absl::StatusOr<EngineSequence*> Create(const v1::OpenSequenceRequest& request);
  // Tokens [first_token, first_token + tokens) of a layer. query_rms [kv_heads, head_dim] (host
  // memory) or empty. The rows may be overwritten when the stream has passed; with host memory when
  // it returns. Errors: LAYER_OUT_OF_RANGE, SHAPE_MISMATCH; LIMIT_EXCEEDED when staging_bytes are
  // waiting (try again); the prefill's failure.
  absl::Status Ingest(EngineSequence* sequence, int64_t layer, int64_t first_token, int64_t tokens,
                      const EngineKv& kv, absl::Span<const float> query_rms, EngineStream stream);
  // How the rows went that were ingested from a GPU; zeros with host memory.
  IngestCounts ingest_counts() const;
  // Waits until all is with the service and clustered. On a GPU the rows must have passed: the
  // caller has synchronised with the stream, or this waits for it. Errors: the prefill's; the
  // service's.
  absl::Status Seal(EngineSequence* sequence);

  // ---- decode
  // A sealed sequence for decoding: one of this engine, or any by its handle. Waits for the
  // service. Errors: as DecodeSession::Attach.
  absl::Status Attach(EngineSequence* sequence);
  absl::StatusOr<EngineSequence*> Attach(const v1::SequenceHandle& handle);
  // A decoded token's K and V of a layer, for each sequence, before the Step that attends to it.
  // Errors: the first one of the batch; INVALID_STATE for one that is not attached.
  absl::Status Append(int64_t layer, absl::Span<const EngineAppend> batch, EngineStream stream);
  // output = attention of queries over all tokens, for each sequence (each at most once). Errors:
  // the first one of the batch; the others are answered all the same.
  absl::Status Step(int64_t layer, absl::Span<const EngineStep> batch, EngineStream stream);
  // Waits until the sequence's calls are done (on a GPU: those that the stream has passed) and
  // returns its first untold failure. Of a group's steps it waits for none: wait for the stream,
  // and it tells whether one has failed, whose outputs are zeros.
  absl::Status Wait(EngineSequence* sequence);

  // ---- decoding without the host
  // From here on the service's GPU answers the steps of these attached sequences by itself, and the
  // batch is a group: Append and Step take all of it, in this order, with queries and outputs dense
  // over the sequences, K and V at multiples of 16 bytes, and layers in order from 0 on. They
  // launch kernels and do nothing else, so a whole step (every layer's Append and Step) can be
  // captured in a CUDA graph and replayed until the next Settle. Waits for the service. Errors:
  // Unavailable, saying why, where it cannot be had (a GPU server of this host, engine's pointers
  // on a GPU, codec "raw", output_type the sequences' element type, and what ConnectResidentRequest
  // says); the sequences are as before then.
  absl::Status Join(absl::Span<EngineSequence* const> batch);
  // Between two steps of the sequence's group, at least every 256 tokens: sends what was appended,
  // and takes over what the service has clustered, which ends with it being the window's. Waits for
  // the stream and the service. Errors: the first failure of a step, whose outputs were zeros: then
  // the group must be left.
  absl::Status Settle(EngineSequence* sequence, EngineStream stream);
  // As Settle, and the group's sequences are single again, on the links that they had. Errors:
  // Settle's; they are single all the same.
  absl::Status Leave(EngineSequence* sequence, EngineStream stream);

  // ---- the end. Of a group: the others leave it too, and its streams have done their work.
  // Sends what was appended and not yet sent, detaches; the service keeps the sequence by its
  // rules. The pointer is gone after it, whatever it returns.
  absl::Status Close(EngineSequence* sequence);
  // As Close, and the service gives its memory back.
  absl::Status Release(EngineSequence* sequence);

  // As the service last told it. Not while another thread calls on the sequence.
  static const v1::Sequence& sequence(const EngineSequence& sequence);
  // "resident" in a group; else "grpc", "peer" or "nccl", and why not a better one; empty before
  // Attach.
  static std::string link(const EngineSequence& sequence);
  static std::string link_reason(const EngineSequence& sequence);

 private:
  struct Impl;
  explicit Engine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_ENGINE_H_
