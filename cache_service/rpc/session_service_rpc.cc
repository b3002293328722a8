#include "cache_service/rpc/session_service_rpc.h"

#include <deque>
#include <memory>
#include <string>
#include <utility>

#include "cache_service/rpc/streams.h"
#include "proto/error.h"

namespace clusterkv::cache_service {
namespace {

// The shard is never called under mutex_: it calls back, perhaps under locks of its own.
class SessionStream final : public grpc::ServerBidiReactor<v1::SessionRequest, v1::SessionResponse>,
                            public OpenStream,
                            public std::enable_shared_from_this<SessionStream> {
 public:
  static SessionStream* Start(RpcContext& rpc, grpc::CallbackServerContext* context) {
    const absl::StatusOr<Caller> caller = rpc.Enter(context);
    auto stream = std::shared_ptr<SessionStream>(
        new SessionStream(rpc, caller.ok() ? *caller->shard : *rpc.shard));
    stream->self_ = stream;
    rpc.streams.Add(stream);
    if (!caller.ok()) {
      stream->EndStream(caller.status());
      return stream.get();
    }
    stream->StartRead(&stream->request_);
    return stream.get();
  }

  void EndStream(const absl::Status& status) override {
    absl::MutexLock lock(&mutex_);
    EndWith(status);
  }

 private:
  // Notices that a worker has not read yet; a worker that far behind is as good as dead.
  static constexpr size_t kMaxQueued = 1024;

  SessionStream(RpcContext& rpc, Shard& shard)
      : rpc_(rpc), shard_(shard), call_(rpc, Method::kSession) {}

  void OnReadDone(bool ok) override {
    if (!ok) {
      absl::MutexLock lock(&mutex_);
      reads_over_ = true;
      MaybeFinish();
      return;
    }
    absl::Status status;
    if (request_.has_hello()) {
      status = TakeHello(request_.hello());
    } else if (request_.has_heartbeat()) {
      status = TakeHeartbeat();
    } else {
      status = WrongKind("hello or heartbeat", "none");
    }
    absl::MutexLock lock(&mutex_);
    if (!status.ok()) {
      EndWith(status);
    } else if (!finished_) {
      StartRead(&request_);
    }
  }

  static absl::Status WrongKind(const std::string& expected, const std::string& got) {
    return Error(v1::INVALID_FIELD, "kind: expected " + expected + ", got " + got,
                 {{"field", "kind"}, {"expected", expected}, {"got", got}});
  }

  absl::Status TakeHello(const v1::SessionRequest::Hello& hello) {
    if (session_id_ != 0) return WrongKind("heartbeat", "a second hello");
    Shard::SessionEvents events;
    events.notice = [weak = weak_from_this()](const v1::SessionResponse::Notice& notice) {
      if (const auto stream = weak.lock()) stream->PushNotice(notice);
    };
    events.expired = [weak = weak_from_this()] {
      if (const auto stream = weak.lock()) stream->Expire();
    };
    bool resumed = false;
    const absl::StatusOr<uint64_t> id =
        shard_.OpenSession(hello.worker(), hello.session_id(), std::move(events), &resumed);
    if (!id.ok()) return id.status();
    session_id_ = *id;
    v1::SessionResponse response;
    v1::SessionResponse::Welcome* welcome = response.mutable_welcome();
    welcome->set_session_id(*id);
    welcome->set_boot_id(shard_.boot_id());
    welcome->set_ttl_ms(
        static_cast<uint32_t>(absl::ToInt64Milliseconds(shard_.options().session_ttl)));
    welcome->set_resumed(resumed);
    absl::MutexLock lock(&mutex_);
    queue_.push_front(std::move(response));  // before notices that came meanwhile
    welcomed_ = true;
    WriteNext();
    return absl::OkStatus();
  }

  absl::Status TakeHeartbeat() {
    if (session_id_ == 0) return WrongKind("hello first", "heartbeat");
    if (absl::Status status = shard_.Heartbeat(session_id_); !status.ok()) return status;
    absl::MutexLock lock(&mutex_);
    if (ack_queued_) return absl::OkStatus();  // one is enough for a worker that reads late
    ack_queued_ = true;
    v1::SessionResponse response;
    response.mutable_ack();
    queue_.push_back(std::move(response));
    WriteNext();
    return absl::OkStatus();
  }

  void PushNotice(const v1::SessionResponse::Notice& notice) {
    absl::MutexLock lock(&mutex_);
    if (finished_ || !status_.ok()) return;
    if (queue_.size() >= kMaxQueued) {
      EndWith(Error(v1::LIMIT_EXCEEDED,
                    "session: expected a worker that reads its notices, got " +
                        std::to_string(kMaxQueued) + " unread ones",
                    {{"limit", "session_notices"}, {"expected", std::to_string(kMaxQueued)}}));
      return;
    }
    v1::SessionResponse response;
    *response.mutable_notice() = notice;
    queue_.push_back(std::move(response));
    WriteNext();
  }

  void Expire() {
    absl::MutexLock lock(&mutex_);
    expired_ = true;
    EndWith(Error(v1::SESSION_NOT_FOUND,
                  "session: expected a heartbeat within its ttl, got none; it is over"));
  }

  void WriteNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (writing_ || !welcomed_ || queue_.empty() || finished_ || !status_.ok()) return;
    writing_ = true;
    response_ = std::move(queue_.front());
    queue_.pop_front();
    if (response_.has_ack()) ack_queued_ = false;
    StartWrite(&response_);
  }

  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&mutex_);
    writing_ = false;
    if (!ok) reads_over_ = true;
    WriteNext();
    MaybeFinish();
  }

  void EndWith(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (status_.ok()) status_ = status;
    MaybeFinish();
  }

  void MaybeFinish() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (finished_ || writing_) return;
    if (!reads_over_ && status_.ok()) return;
    finished_ = true;
    Finish(call_.End(status_));
  }

  void OnCancel() override { cancelled_.store(true, std::memory_order_relaxed); }

  void OnDone() override {
    rpc_.streams.Remove(this);
    bool at_once = false;
    {
      absl::MutexLock lock(&mutex_);
      // Only a worker that closes its side by itself means it: what broke may come back.
      at_once = status_.ok() && !cancelled_.load(std::memory_order_relaxed);
      if (expired_) session_id_ = 0;
    }
    if (session_id_ != 0) shard_.CloseSession(session_id_, at_once);
    self_.reset();
  }

  RpcContext& rpc_;
  Shard& shard_;  // as the worker's tenant sees it
  RpcCall call_;
  std::atomic<bool> cancelled_{false};
  std::shared_ptr<SessionStream> self_;  // until OnDone
  v1::SessionRequest request_;           // of the reader
  uint64_t session_id_ = 0;              // of the reader, then of OnDone

  absl::Mutex mutex_;
  std::deque<v1::SessionResponse> queue_ ABSL_GUARDED_BY(mutex_);
  v1::SessionResponse response_ ABSL_GUARDED_BY(mutex_);  // being written
  bool welcomed_ ABSL_GUARDED_BY(mutex_) = false;
  bool ack_queued_ ABSL_GUARDED_BY(mutex_) = false;
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool reads_over_ ABSL_GUARDED_BY(mutex_) = false;
  bool expired_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

grpc::ServerBidiReactor<v1::SessionRequest, v1::SessionResponse>* SessionServiceRpc::Session(
    grpc::CallbackServerContext* context) {
  return SessionStream::Start(rpc_, context);
}

}  // namespace clusterkv::cache_service
