// PutKv: chunks of K and V on a client stream.
//
// The first message names the sequence; the handle is resolved then, so that a sequence of the same
// name that is opened later never gets this stream's bytes. While one chunk is copied into the
// arena the next one is received. What was accepted stays when the stream ends early.
#ifndef CLUSTERKV_CACHE_SERVICE_RPC_PUT_KV_STREAM_H_
#define CLUSTERKV_CACHE_SERVICE_RPC_PUT_KV_STREAM_H_

#include <atomic>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "cache_service/rpc/rpc_context.h"
#include "clusterkv/v1/cache_service.pb.h"

namespace clusterkv::cache_service {

// Takes one PutKv message after the other. Knows no gRPC. Not thread-safe.
class PutKvTaker {
 public:
  PutKvTaker(const RpcContext& rpc, const Caller& caller) : rpc_(rpc), caller_(caller) {}
  // Errors: INVALID_FIELD (no sequence in the first message, another one later), CHUNK_TOO_LARGE,
  // RATE_LIMITED, and what the shard says of chunk and statistics. What was taken before stays.
  absl::Status Take(const v1::PutKvRequest& request);
  // The stream is over. Errors: STREAM_TRUNCATED when no message came.
  absl::Status End(v1::PutKvResponse* response);

 private:
  absl::Status TakeSequence(const v1::PutKvRequest& request);
  absl::Status TakeChunk(const v1::KvChunk& chunk);
  absl::Status TakeStatistics(const v1::LayerStatistics& statistics);

  const RpcContext& rpc_;
  const Caller caller_;
  bool named_ = false;
  v1::SequenceHandle sequence_;  // with generation and boot id
  uint64_t chunks_ = 0, bytes_ = 0;
  std::vector<float> numbers_;
};

class PutKvStream final : public grpc::ServerReadReactor<v1::PutKvRequest> {
 public:
  // Owns itself until the library is done with it.
  static PutKvStream* Start(const RpcContext& rpc, grpc::CallbackServerContext* context,
                            v1::PutKvResponse* response);

 private:
  PutKvStream(const RpcContext& rpc, const Caller& caller, v1::PutKvResponse* response);
  void OnReadDone(bool ok) override;
  void OnCancel() override { cancelled_.store(true, std::memory_order_relaxed); }
  void OnDone() override { delete this; }
  void FinishWith(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void FinishAtEnd() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  v1::PutKvResponse* const response_;
  std::atomic<bool> cancelled_{false};
  // Touched by the thread that works, without the mutex.
  PutKvTaker taker_;
  v1::PutKvRequest requests_[2];  // one is read while the other is taken

  absl::Mutex mutex_;
  RpcCall call_ ABSL_GUARDED_BY(mutex_);
  int reading_ ABSL_GUARDED_BY(mutex_) = 0;          // which of requests_
  bool working_ ABSL_GUARDED_BY(mutex_) = false;     // a thread takes the other one
  bool next_is_in_ ABSL_GUARDED_BY(mutex_) = false;  // requests_[reading_] came while working
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_RPC_PUT_KV_STREAM_H_
