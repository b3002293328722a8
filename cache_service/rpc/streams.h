// The two shapes of streams that the data path has, as reactors of gRPC's callback API.
//
//   WriteStream      one request, a bounded run of messages
//   ExchangeStream   requests and their answers on one stream, in order, several under way
//
// Reactions come on gRPC's threads and answers on the shard's; each stream has one mutex. Reads,
// writes and Finish are started under it: the library never runs a reaction inside of them. A
// stream owns itself until OnDone; what works for it holds a shared_ptr.
#ifndef CLUSTERKV_CACHE_SERVICE_RPC_STREAMS_H_
#define CLUSTERKV_CACHE_SERVICE_RPC_STREAMS_H_

#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "cache_service/rpc/rpc_context.h"
#include "cache_service/rpc/spinning_poll.h"
#include "proto/error.h"

namespace clusterkv::cache_service {

inline absl::Status CancelledByClient() {
  return Error(v1::CANCELLED_BY_CLIENT, "call: cancelled by the client");
}

// A server stream. Its messages come from a function, one at a time, each when the one before has
// left: a slow reader costs one message of memory. At the deadline the stream is cut, even while
// its client does not read.
template <typename Response>
class WriteStream : public grpc::ServerWriteReactor<Response>,
                    public std::enable_shared_from_this<WriteStream<Response>> {
 public:
  // Fills the next message; false: there is none. An error ends the stream with it.
  using NextMessage = std::function<absl::StatusOr<bool>(Response*)>;

  static std::shared_ptr<WriteStream> Start(const RpcContext& rpc, Method method,
                                            grpc::CallbackServerContext* context) {
    auto stream = std::shared_ptr<WriteStream>(new WriteStream(rpc, method, context));
    stream->self_ = stream;
    stream->ArmDeadline();
    return stream;
  }

  CallContext call_context() const {
    return {deadline_,
            [cancelled = cancelled_] { return cancelled->load(std::memory_order_relaxed); }};
  }

  // Begins to write, or ends with an error. Exactly one of them, once.
  void Run(NextMessage next) ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    next_ = std::move(next);
    WriteNext();
  }
  void Fail(const absl::Status& status) ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    FinishWith(status);
  }

 private:
  WriteStream(const RpcContext& rpc, Method method, grpc::CallbackServerContext* context)
      : rpc_(rpc),
        call_(rpc, method),
        deadline_(DeadlineOf(rpc, context)),
        context_(context),
        cancelled_(std::make_shared<std::atomic<bool>>(false)) {}

  void ArmDeadline() {
    alarm_.Set(absl::ToChronoTime(deadline_), [weak = this->weak_from_this()](bool expired) {
      const std::shared_ptr<WriteStream> stream = weak.lock();
      if (!expired || stream == nullptr) return;
      absl::MutexLock lock(&stream->mutex_);
      // A write that its reader does not take never completes: only cancelling frees what it holds.
      if (!stream->done_ && !stream->finished_) stream->context_->TryCancel();
    });
  }

  void WriteNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (cancelled_->load(std::memory_order_relaxed)) {
      FinishWith(absl::Now() >= deadline_
                     ? Error(v1::QUEUE_DEADLINE, "deadline: passed before all records were sent")
                     : CancelledByClient());
      return;
    }
    message_.Clear();
    absl::StatusOr<bool> more = next_(&message_);
    if (!more.ok()) {
      FinishWith(more.status());
    } else if (!*more) {
      FinishWith(absl::OkStatus());
    } else {
      sending_ = absl::Now();
      this->StartWrite(&message_);
    }
  }

  void FinishWith(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    finished_ = true;
    next_ = nullptr;  // lets go of the pins
    this->Finish(call_.End(status));
  }

  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&mutex_);
    rpc_.metrics->RecordStage(Stage::kSend, absl::Now() - sending_);
    if (ok) {
      WriteNext();
    } else {
      FinishWith(CancelledByClient());
    }
  }
  void OnCancel() override { cancelled_->store(true, std::memory_order_relaxed); }
  void OnDone() override {
    alarm_.Cancel();
    {
      absl::MutexLock lock(&mutex_);
      done_ = true;
    }
    self_.reset();
  }

  const RpcContext& rpc_;
  RpcCall call_;
  const absl::Time deadline_;
  grpc::CallbackServerContext* const context_;  // until OnDone
  const std::shared_ptr<std::atomic<bool>> cancelled_;
  std::shared_ptr<WriteStream> self_;  // until OnDone
  grpc::Alarm alarm_;
  absl::Mutex mutex_;
  NextMessage next_ ABSL_GUARDED_BY(mutex_);
  Response message_ ABSL_GUARDED_BY(mutex_);
  absl::Time sending_ ABSL_GUARDED_BY(mutex_);  // since when the message is
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
  bool done_ ABSL_GUARDED_BY(mutex_) = false;
};

// A bidirectional stream of exchanges. An Exchange is one request and its answer:
//
//   using Request, Response;
//   Request request;
//   // Parses and starts. `ready` is called once, on any thread, when Next may be called; not when
//   an
//   // error is returned: that is about the whole request and ends the stream, after the answers to
//   // earlier ones.
//   absl::Status Begin(const RpcContext&, const Caller&, CallContext, bool inline_ok,
//                      std::function<void()> ready);
//   // Fills the next message of the answer; true: it is the last one.
//   bool Next(Response*);
//   void Clear();  // for the next request
//
// Answers leave in the order of requests. At most kMaxOutstanding requests are under way: then the
// stream is not read until one is answered.
template <typename Exchange>
class ExchangeStream
    : public grpc::ServerBidiReactor<typename Exchange::Request, typename Exchange::Response>,
      public OpenStream,
      public std::enable_shared_from_this<ExchangeStream<Exchange>> {
 public:
  static constexpr size_t kMaxOutstanding = 64;

  static ExchangeStream* Start(RpcContext& rpc, Method method,
                               grpc::CallbackServerContext* context) {
    auto stream = std::shared_ptr<ExchangeStream>(new ExchangeStream(rpc, method, context));
    stream->self_ = stream;
    rpc.streams.Add(stream);
    absl::StatusOr<Caller> caller = rpc.CallerOf(context);
    absl::MutexLock lock(&stream->mutex_);
    if (!caller.ok()) {
      stream->EndWith(caller.status());
      return stream.get();
    }
    stream->caller_ = *caller;
    stream->ReadNext();
    return stream.get();
  }

  void EndStream(const absl::Status& status) override {
    absl::MutexLock lock(&mutex_);
    EndWith(status);
  }

 private:
  struct Slot {
    Exchange exchange;
    typename Exchange::Response response;
    bool ready = false;
  };

  ExchangeStream(RpcContext& rpc, Method method, grpc::CallbackServerContext* context)
      : rpc_(rpc),
        call_(rpc, method),
        context_(context),
        cancelled_(std::make_shared<std::atomic<bool>>(false)) {}

  // Of one exchange: the stream's deadline, if any, or default_deadline from now.
  CallContext ExchangeContext() const {
    return {DeadlineOf(rpc_, context_),
            [cancelled = cancelled_] { return cancelled->load(std::memory_order_relaxed); }};
  }

  void ReadNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const bool may_read = incoming_ == nullptr && !beginning_ && !reads_over_ && status_.ok() &&
                          in_flight_.size() < kMaxOutstanding;
    if (!may_read || finished_) return;
    if (spare_.empty()) {
      incoming_ = std::make_unique<Slot>();
    } else {
      incoming_ = std::move(spare_.back());
      spare_.pop_back();
    }
    this->StartRead(&incoming_->exchange.request);
  }

  void OnReadDone(bool ok) override {
    Slot* slot = nullptr;
    bool alone = false;
    {
      absl::MutexLock lock(&mutex_);
      if (!ok || !status_.ok()) {
        reads_over_ = true;
        incoming_.reset();
        MaybeFinish();
        return;
      }
      slot = incoming_.get();
      in_flight_.push_back(std::move(incoming_));
      beginning_ = true;
      alone = in_flight_.size() == 1;
    }
    const absl::Status begun =
        slot->exchange.Begin(rpc_, caller_, ExchangeContext(), alone,
                             [self = this->shared_from_this(), slot] { self->OnReady(slot); });
    // From here on `slot` may serve another request: its answer may have left.
    absl::MutexLock lock(&mutex_);
    beginning_ = false;
    if (!begun.ok()) {
      in_flight_.pop_back();  // still the last: nothing is read before this one has begun
      EndWith(begun);
      return;
    }
    ReadNext();
    MaybeFinish();
  }

  void OnReady(Slot* slot) ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    slot->ready = true;
    WriteNext();
  }

  void WriteNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (writing_) return;
    while (broken_ && !in_flight_.empty() && in_flight_.front()->ready) PopFront();
    if (in_flight_.empty() || !in_flight_.front()->ready) {
      MaybeFinish();
      return;
    }
    Slot* front = in_flight_.front().get();
    front->response.Clear();
    last_message_ = front->exchange.Next(&front->response);
    writing_ = true;
    sending_ = absl::Now();
    this->StartWrite(&front->response);
  }

  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&mutex_);
    rpc_.metrics->RecordStage(Stage::kSend, absl::Now() - sending_);
    writing_ = false;
    if (!ok) broken_ = true;
    if (last_message_ || broken_) {
      PopFront();
      ReadNext();
    }
    WriteNext();
  }

  void PopFront() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    std::unique_ptr<Slot> slot = std::move(in_flight_.front());
    in_flight_.pop_front();
    slot->exchange.Clear();
    slot->ready = false;
    if (spare_.size() < kMaxSpare) spare_.push_back(std::move(slot));
  }

  void EndWith(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (status_.ok()) status_ = status;
    MaybeFinish();
  }

  void MaybeFinish() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (finished_ || writing_ || beginning_ || !in_flight_.empty()) return;
    if (!reads_over_ && status_.ok()) return;
    finished_ = true;
    if (status_.ok() && (broken_ || cancelled_->load(std::memory_order_relaxed))) {
      status_ = CancelledByClient();
    }
    this->Finish(call_.End(status_));
  }

  void OnCancel() override { cancelled_->store(true, std::memory_order_relaxed); }
  void OnDone() override {
    rpc_.streams.Remove(this);
    self_.reset();
  }

  static constexpr size_t kMaxSpare = 4;

  PollSpinScope spin_;  // the next request may come at any moment
  RpcContext& rpc_;
  Caller caller_;  // before the first read
  RpcCall call_;
  grpc::CallbackServerContext* const context_;  // until OnDone
  const std::shared_ptr<std::atomic<bool>> cancelled_;
  std::shared_ptr<ExchangeStream> self_;  // until OnDone
  absl::Mutex mutex_;
  std::unique_ptr<Slot> incoming_ ABSL_GUARDED_BY(mutex_);               // being read
  std::deque<std::unique_ptr<Slot>> in_flight_ ABSL_GUARDED_BY(mutex_);  // in order of requests
  std::vector<std::unique_ptr<Slot>> spare_ ABSL_GUARDED_BY(mutex_);
  bool beginning_ ABSL_GUARDED_BY(mutex_) = false;     // the last one read is being started
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;       // the front's response
  absl::Time sending_ ABSL_GUARDED_BY(mutex_);         // since when it is
  bool last_message_ ABSL_GUARDED_BY(mutex_) = false;  // of the front, being written
  bool reads_over_ ABSL_GUARDED_BY(mutex_) = false;
  bool broken_ ABSL_GUARDED_BY(mutex_) = false;  // a write failed
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);  // why the server ends the stream
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_RPC_STREAMS_H_
