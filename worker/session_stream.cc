#include "worker/session_stream.h"

#include <grpcpp/channel.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/grpc_status.h"
#include "worker/transport_failure.h"

namespace clusterkv::worker {
namespace {

using Clock = std::chrono::steady_clock;
using Stream = grpc::ClientReaderWriterInterface<v1::SessionRequest, v1::SessionResponse>;

constexpr std::chrono::milliseconds kFirstPause(10);
constexpr std::chrono::milliseconds kLongestPause(500);
constexpr std::chrono::milliseconds kFarewell(500);
// How long a server may take to welcome a worker.
constexpr absl::Duration kFirstTtl = absl::Seconds(10);

}  // namespace

struct SessionStream::Attempt {
  grpc::ClientContext context;
  std::unique_ptr<Stream> stream;
  bool welcomed = false;
  bool over = false;        // nothing more will be read
  Clock::time_point heard;  // last message
};

SessionStream::SessionStream(const std::shared_ptr<grpc::Channel>& channel, std::string worker_name,
                             NoticeHandler on_notice)
    : stub_(v1::SessionService::NewStub(channel)),
      worker_name_(std::move(worker_name)),
      on_notice_(std::move(on_notice)),
      ttl_(kFirstTtl),
      thread_([this] { Run(); }) {}

SessionStream::~SessionStream() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

absl::Status SessionStream::WaitUntilOpen(uint64_t boot_id, absl::Duration timeout) {
  std::unique_lock lock(mutex_);
  const bool open = changed_.wait_for(lock, absl::ToChronoNanoseconds(timeout), [&] {
    if (open_) return boot_id == 0 || boot_id_ == boot_id;
    return !last_error_.ok() && !IsTransportFailure(last_error_);
  });
  if (open && open_) return absl::OkStatus();
  if (!last_error_.ok()) return last_error_;
  return absl::UnavailableError(absl::StrCat("no session after ", absl::FormatDuration(timeout)));
}

uint64_t SessionStream::session_id() const {
  std::lock_guard lock(mutex_);
  return open_ ? resume_id_ : 0;
}

void SessionStream::Run() {
  auto pause = kFirstPause;
  while (true) {
    if (RunOnce()) pause = kFirstPause;
    std::unique_lock lock(mutex_);
    if (changed_.wait_for(lock, pause, [&] { return stopping_; })) return;
    pause = std::min(2 * pause, kLongestPause);
  }
}

bool SessionStream::RunOnce() {
  Attempt attempt;
  // Longer than any session; without one the server would set a deadline of its own.
  attempt.context.set_deadline(std::chrono::system_clock::now() + std::chrono::hours(24 * 365));
  attempt.stream = stub_->Session(&attempt.context);
  v1::SessionRequest hello;
  hello.mutable_hello()->set_worker(worker_name_);
  {
    std::lock_guard lock(mutex_);
    hello.mutable_hello()->set_session_id(resume_id_);
  }
  attempt.heard = Clock::now();
  attempt.stream->Write(hello);  // a failure shows in the reading
  std::thread reader([&] { Read(&attempt); });
  std::unique_lock lock(mutex_);
  Beat(&attempt, lock);
  open_ = false;
  const bool farewell = stopping_ && !attempt.over;
  if (farewell) {
    lock.unlock();
    attempt.stream->WritesDone();
    lock.lock();
    changed_.wait_for(lock, kFarewell, [&] { return attempt.over; });
  }
  const bool welcomed = attempt.welcomed;
  lock.unlock();
  attempt.context.TryCancel();
  reader.join();
  const absl::Status status = FromGrpcStatus(attempt.stream->Finish());
  lock.lock();
  last_error_ = status;
  if (status.ok() || ReasonOf(status) == v1::SESSION_NOT_FOUND) {
    last_error_ = absl::UnavailableError("the session's stream ended");
  }
  // It cannot be resumed: start anew.
  if (ReasonOf(status) == v1::SESSION_NOT_FOUND) resume_id_ = 0;
  changed_.notify_all();
  return welcomed;
}

// Beats until the stream is over, silent for too long, or nobody wants it any more.
void SessionStream::Beat(Attempt* attempt, std::unique_lock<std::mutex>& lock) {
  v1::SessionRequest heartbeat;
  heartbeat.mutable_heartbeat();
  const auto ended = [&] { return attempt->over || stopping_; };
  changed_.wait_for(lock, absl::ToChronoNanoseconds(kFirstTtl),
                    [&] { return ended() || attempt->welcomed; });
  while (attempt->welcomed && !ended()) {
    const auto ttl = absl::ToChronoNanoseconds(ttl_);
    if (Clock::now() - attempt->heard > ttl) return;
    if (changed_.wait_for(lock, ttl / 3, ended)) return;
    lock.unlock();
    attempt->stream->Write(heartbeat);
    lock.lock();
  }
}

void SessionStream::Read(Attempt* attempt) {
  v1::SessionResponse response;
  while (attempt->stream->Read(&response)) {
    {
      std::lock_guard lock(mutex_);
      attempt->heard = Clock::now();
    }
    if (response.has_welcome()) Welcome(attempt, response.welcome());
    if (response.has_notice() && on_notice_) on_notice_(response.notice());
  }
  std::lock_guard lock(mutex_);
  attempt->over = true;
  open_ = false;
  changed_.notify_all();
}

void SessionStream::Welcome(Attempt* attempt, const v1::SessionResponse::Welcome& welcome) {
  bool lost = false;
  {
    std::lock_guard lock(mutex_);
    lost = resume_id_ != 0 && !welcome.resumed();
    attempt->welcomed = true;
    resume_id_ = welcome.session_id();
    boot_id_ = welcome.boot_id();
    ttl_ = absl::Milliseconds(std::max<uint32_t>(welcome.ttl_ms(), 1));
    last_error_ = absl::OkStatus();
    open_ = true;
  }
  changed_.notify_all();
  if (lost && on_notice_) {
    v1::SessionResponse::Notice notice;
    notice.set_kind(v1::SessionResponse::Notice::ATTACHMENT_LOST);
    notice.set_detail("the session could not be resumed; a new one was opened");
    on_notice_(notice);
  }
}

}  // namespace clusterkv::worker
