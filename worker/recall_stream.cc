#include "worker/recall_stream.h"

#include <chrono>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/base/check.h"
#include "proto/error.h"
#include "proto/grpc_status.h"

namespace clusterkv::worker {
namespace {

// One operation is under way at a time, so that one tag is enough.
void* const kTag = reinterpret_cast<void*>(1);

}  // namespace

absl::StatusOr<std::unique_ptr<RecallStream>> RecallStream::Open(Client* client,
                                                                 absl::Duration spin) {
  auto stream = std::unique_ptr<RecallStream>(new RecallStream(client->call_timeout(), spin));
  // The stream lives as long as the session; without a deadline the server would set one of its
  // own.
  stream->context_.set_deadline(std::chrono::system_clock::now() + std::chrono::hours(24 * 365));
  stream->stream_ =
      client->cache().PrepareAsyncStreamSelectAndRecall(&stream->context_, &stream->queue_);
  stream->stream_->StartCall(kTag);
  if (!stream->Wait()) return stream->Broken("start");
  return stream;
}

RecallStream::~RecallStream() {
  if (stream_ != nullptr && !finished_) {
    context_.TryCancel();
    grpc::Status status;
    stream_->Finish(&status, kTag);
    bool ok = false;
    Next(absl::InfiniteFuture(), &ok);
  }
  queue_.Shutdown();
  void* tag = nullptr;
  bool ok = false;
  while (queue_.Next(&tag, &ok)) {
  }
}

absl::Status RecallStream::Write(const v1::SelectAndRecallRequest& request) {
  stream_->Write(request, kTag);
  return Wait() ? absl::OkStatus() : Broken("write");
}

absl::Status RecallStream::Read(v1::SelectAndRecallResponse* response) {
  stream_->Read(response, kTag);
  return Wait() ? absl::OkStatus() : Broken("read");
}

bool RecallStream::Wait() {
  const absl::Time start = absl::Now();
  bool ok = false;
  if (spin_ > absl::ZeroDuration()) {
    const absl::Time until = start + spin_;
    do {
      if (Next(absl::InfinitePast(), &ok)) return ok;
    } while (absl::Now() < until);
  }
  if (Next(start + timeout_, &ok)) return ok;
  timed_out_ = true;
  context_.TryCancel();
  CKV_CHECK(Next(absl::InfiniteFuture(), &ok)) << "a cancelled operation never ended";
  return false;
}

bool RecallStream::Next(absl::Time deadline, bool* ok) {
  gpr_timespec when = gpr_inf_future(GPR_CLOCK_REALTIME);
  if (deadline == absl::InfinitePast()) {
    when = gpr_time_0(GPR_CLOCK_REALTIME);
  } else if (deadline != absl::InfiniteFuture()) {
    const int64_t nanos = absl::ToUnixNanos(deadline);
    when = {nanos / 1'000'000'000, static_cast<int32_t>(nanos % 1'000'000'000), GPR_CLOCK_REALTIME};
  }
  void* tag = nullptr;
  return queue_.AsyncNext(&tag, ok, when) == grpc::CompletionQueue::GOT_EVENT;
}

absl::Status RecallStream::Broken(const char* what) {
  grpc::Status status;
  stream_->Finish(&status, kTag);
  finished_ = true;
  bool ok = false;
  const bool ended = Next(absl::Now() + timeout_, &ok);
  if (!ended) {
    context_.TryCancel();
    Next(absl::InfiniteFuture(), &ok);
  }
  if (timed_out_ || !ended) {
    return Error(v1::QUEUE_DEADLINE, absl::StrCat("StreamSelectAndRecall: no answer to ", what,
                                                  " after ", absl::FormatDuration(timeout_)));
  }
  if (status.ok()) {
    return absl::UnavailableError(absl::StrCat("StreamSelectAndRecall: ended at ", what));
  }
  return FromGrpcStatus(status);
}

}  // namespace clusterkv::worker
