// The seam between an engine's pointers and the rest of the worker: host memory, or a GPU's.
//
// Engine (engine.h) is the same code over both. With host memory a stream's work is done when the
// call that asked for it returns; on a GPU it is done when the stream comes to it, and nothing here
// waits for a stream of the caller's.
#ifndef CLUSTERKV_WORKER_ENGINE_DEVICE_H_
#define CLUSTERKV_WORKER_ENGINE_DEVICE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "worker/decode_session.h"
#include "worker/ingest_ring.h"

namespace clusterkv::worker {

// What one attached sequence has on the device. Calls of the caller's thread and of the worker's
// thread may run at once; each kind one at a time.
class EngineLayers {
 public:
  virtual ~EngineLayers() = default;

  // Caller's thread: one step more of the layer will be published. Errors: DeadlineExceeded when an
  // earlier one was not in time, and the device went on without it: the sequence is of no use.
  virtual absl::Status Begin(int64_t layer) = 0;
  // Worker's thread, in the same order: what the service answered, or why it did not. Returns how
  // the step ended.
  virtual absl::Status Publish(int64_t layer, const std::byte* queries, DecodeSession* session,
                               const absl::Status& recalled) = 0;
  // Caller's thread: `stream` waits for the step's Publish, attends and writes `output`, zeros
  // after a failure. With host memory it returns the step's status, on a GPU what could not be
  // launched.
  virtual absl::Status Attend(int64_t layer, void* output, EngineStream stream) = 0;
  virtual int64_t held_bytes() const = 0;  // of KV, on the device
};

// Attached sequences that are decoded together and whose steps the service's GPU answers by itself.
// One thread. When it dies the service writes no more; the sessions know all tokens up to the last
// Settle.
class EngineGroup {
 public:
  virtual ~EngineGroup() = default;

  // A token's K and V of a layer; [sequences] of [kv_heads] rows.
  virtual absl::Status Append(int64_t layer, absl::Span<const EngineRows> keys,
                              absl::Span<const EngineRows> values, EngineStream stream) = 0;
  // queries and output [sequences, query_heads, head_dim]. Layers in order, all of them in a step.
  virtual absl::Status Step(int64_t layer, const void* queries, void* output,
                            EngineStream stream) = 0;
  // What went wrong in the steps that the GPU has done, since the group is there. Does not wait.
  virtual absl::Status Failure() const = 0;
  // Waits for the stream; hands what was appended over to the sessions and the service, and takes
  // over what was clustered. Errors: the steps' first failure: there is no group any more.
  virtual absl::Status Settle(EngineStream stream) = 0;
};

class EngineDevice {
 public:
  virtual ~EngineDevice() = default;

  // True: a stream's work is done when its call returns.
  virtual bool synchronous() const = 0;
  // Host memory that Gather can fill. Errors: ResourceExhausted.
  virtual absl::StatusOr<std::shared_ptr<std::byte>> Staging(int64_t bytes) = 0;
  // Copies rows to `to` [tokens, heads, row_bytes], a place in Staging's memory, when `stream`
  // comes to it.
  virtual absl::Status Gather(const EngineRows& rows, std::byte* to, EngineStream stream) = 0;
  // Runs f once `stream` has done all it was given so far; f only hands work to another thread. On
  // a device that fails before, Check runs f, with the failure.
  virtual absl::Status Then(EngineStream stream, std::function<void(const absl::Status&)> f) = 0;
  // OK, or what ended the device's use in this process (INTERNAL_ERROR). Waits for nothing; from
  // any thread but Then's.
  virtual absl::Status Check() = 0;
  // Slots that a service on this host can read. Errors: Unavailable where memory is the host's;
  // ResourceExhausted.
  virtual absl::StatusOr<std::unique_ptr<IngestRing>> MakeIngestRing(int slots,
                                                                     int64_t slot_bytes) = 0;
  // For DecodeOptions::make_window; null: a step attends to the host's records.
  virtual RecordWindowMaker window_maker() const { return nullptr; }
  // `output_type`: of what Attend writes.
  virtual absl::StatusOr<std::unique_ptr<EngineLayers>> MakeLayers(const DecodeSession& session,
                                                                   v1::ElementType output_type) = 0;
  // The sessions outlive the group. Errors: Unavailable, saying why, when there is none to be had.
  virtual absl::StatusOr<std::unique_ptr<EngineGroup>> MakeGroup(
      absl::Span<DecodeSession* const> sessions, v1::ElementType output_type) = 0;
};

// device: "cpu", "cuda" or "cuda:N". step_timeout: how long a GPU's stream waits for an answer.
// Errors: InvalidArgument for another name; Unavailable for a GPU that there is not, or in a
// worker built without CUDA.
absl::StatusOr<std::unique_ptr<EngineDevice>> MakeEngineDevice(const std::string& device,
                                                               absl::Duration step_timeout);

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_ENGINE_DEVICE_H_
