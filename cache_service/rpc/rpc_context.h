// What all handlers share, and the bookkeeping of one RPC.
//
// RpcContext outlives every call of the server that it belongs to. Thread-safe.
#ifndef CLUSTERKV_CACHE_SERVICE_RPC_RPC_CONTEXT_H_
#define CLUSTERKV_CACHE_SERVICE_RPC_RPC_CONTEXT_H_

#include <grpcpp/alarm.h>
#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>
#include <grpcpp/support/status.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "cache_service/shard.h"
#include "cache_service/shard_list.h"
#include "cache_service/telemetry/server_metrics.h"
#include "cache_service/tenants.h"

namespace clusterkv::cache_service {

// A stream that stays open while its client likes: it can be ended from the server's side.
class OpenStream {
 public:
  virtual ~OpenStream() = default;
  // Ends the stream with `status` once what it has begun is answered. Any thread; at most once
  // useful.
  virtual void EndStream(const absl::Status& status) = 0;
};

// The open streams, so that a drained server can end them with a reason.
class StreamRegistry {
 public:
  void Add(const std::shared_ptr<OpenStream>& stream) ABSL_LOCKS_EXCLUDED(mutex_);
  void Remove(OpenStream* stream) ABSL_LOCKS_EXCLUDED(mutex_);
  // Ends all, those included that are added later.
  void EndAll(const absl::Status& status) ABSL_LOCKS_EXCLUDED(mutex_);
  // Waits until no stream is open. Returns whether it came to that within `limit`.
  bool AwaitNone(absl::Duration limit) ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  absl::Mutex mutex_;
  std::map<OpenStream*, std::weak_ptr<OpenStream>> streams_ ABSL_GUARDED_BY(mutex_);
  absl::Status ended_ ABSL_GUARDED_BY(mutex_);
};

// Whose call it is, and the shard as that one sees it.
struct Caller {
  Shard* shard = nullptr;
  Tenant* tenant = nullptr;  // null: the server knows no tenants

  // Errors: RATE_LIMITED.
  absl::Status AdmitCall() const {
    return tenant == nullptr ? absl::OkStatus() : tenant->AdmitCall(absl::Now());
  }
  absl::Status AdmitBytes(int64_t bytes) const {
    return tenant == nullptr ? absl::OkStatus() : tenant->AdmitBytes(bytes, absl::Now());
  }
};

struct RpcContext {
  Shard* shard = nullptr;
  ShardList* shards = nullptr;                // null: there are no others
  Tenants* tenants = nullptr;                 // null: everybody is one and the same
  std::vector<std::string> admin_identities;  // empty: all may call the admin service
  ServerMetrics* metrics = nullptr;
  std::string version;
  std::string device = "cpu";
  int64_t max_chunk_bytes = 0;
  int64_t max_batch_items = 0;
  absl::Duration default_deadline = absl::Seconds(30);
  absl::Duration drain_timeout = absl::Seconds(30);
  StreamRegistry streams;

  // By the certificate of the connection. Errors: IDENTITY_REFUSED when it is no tenant's.
  absl::StatusOr<Caller> CallerOf(grpc::CallbackServerContext* context) const;
  // CallerOf, counted as a call of the tenant's. Errors: RATE_LIMITED as well.
  absl::StatusOr<Caller> Enter(grpc::CallbackServerContext* context) const;
  // Errors: IDENTITY_REFUSED.
  absl::Status CheckAdmin(grpc::CallbackServerContext* context) const;
  // The view of a tenant by its name, for administration; empty: the default tenant's.
  // Errors: INVALID_FIELD when there is no such tenant.
  absl::StatusOr<Shard*> ShardOf(const std::string& tenant) const;

  // Refuses a call on a sequence that `shard` does not hold and another one owns. Errors:
  // NOT_OWNER.
  absl::Status CheckOwner(Shard& shard, const std::string& sequence) const;
  // The same for one that is opened, which goes to none of `without` and to none that drains.
  absl::Status CheckTaker(Shard& shard, const std::string& sequence,
                          const std::vector<std::string>& without) const;
  // `status` as a client is told it: SEQUENCE_NOT_FOUND of what another shard owns is NOT_OWNER.
  absl::Status Placed(const absl::Status& status) const;

  // The shard's figures and what the server counts itself.
  v1::Stats Stats() const;
  // Counts an error that goes out, be it an RPC's or an item's.
  void CountError(Method method, const absl::Status& status) const;
};

// One RPC's bookkeeping: made when it starts; End exactly once, with what it answers.
class RpcCall {
 public:
  RpcCall(const RpcContext& rpc, Method method);
  RpcCall(const RpcCall&) = delete;
  RpcCall& operator=(const RpcCall&) = delete;
  ~RpcCall();

  // Counts the call, and the error if it is one, and turns it into what the wire carries.
  grpc::Status End(const absl::Status& answer);

 private:
  const RpcContext& rpc_;
  const Method method_;
  const absl::Time start_;
  bool ended_ = false;
};

// The client's deadline, or default_deadline from now; cancelled when the call is. Valid while the
// call is.
CallContext MakeCallContext(const RpcContext& rpc, grpc::CallbackServerContext* context);
// The client's deadline, or default_deadline from now.
absl::Time DeadlineOf(const RpcContext& rpc, grpc::CallbackServerContext* context);

// A unary call that is answered at once: `answer` takes the Caller, validates, calls and encodes;
// it returns absl::Status.
template <typename F>
grpc::ServerUnaryReactor* AnswerNow(const RpcContext& rpc, Method method,
                                    grpc::CallbackServerContext* context, F&& answer) {
  RpcCall call(rpc, method);
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const absl::StatusOr<Caller> caller = rpc.Enter(context);
  reactor->Finish(call.End(caller.ok() ? answer(*caller) : caller.status()));
  return reactor;
}

// The same for the admin service: `answer` takes nothing.
template <typename F>
grpc::ServerUnaryReactor* AnswerAdmin(const RpcContext& rpc, Method method,
                                      grpc::CallbackServerContext* context, F&& answer) {
  RpcCall call(rpc, method);
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  absl::Status status = rpc.CheckAdmin(context);
  if (status.ok()) status = answer();
  reactor->Finish(call.End(status));
  return reactor;
}

// A unary call that is answered later, by whichever comes first: its work, its deadline, its
// cancellation. Owns itself until the library is done with it; work holds a shared_ptr, so that an
// answer that comes too late finds it alive and changes nothing.
class LaterUnary : public grpc::ServerUnaryReactor,
                   public std::enable_shared_from_this<LaterUnary> {
 public:
  static std::shared_ptr<LaterUnary> Start(const RpcContext& rpc, Method method,
                                           grpc::CallbackServerContext* context);

  // Deadline and cancellation, for the shard. Valid even after the call.
  CallContext call_context() const;

  // Answers, unless that was done: then `fill` is not called. `fill` encodes the response.
  template <typename F>
  void Answer(const absl::Status& status, F&& fill) ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    if (finished_) return;
    if (status.ok()) fill();
    FinishLocked(status);
  }

 private:
  struct Private {};

 public:
  LaterUnary(Private, const RpcContext& rpc, Method method, grpc::CallbackServerContext* context);

 private:
  void ArmDeadline();
  void FinishLocked(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void OnCancel() override;
  void OnDone() override;

  RpcCall call_;
  const absl::Time deadline_;
  const std::shared_ptr<std::atomic<bool>> cancelled_;
  std::shared_ptr<LaterUnary> self_;  // until OnDone
  grpc::Alarm alarm_;
  absl::Mutex mutex_;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_RPC_RPC_CONTEXT_H_
