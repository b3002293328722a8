#include "cache_service/rpc/rpc_context.h"

#include <chrono>
#include <vector>

#include "absl/time/clock.h"
#include "cache_service/telemetry/log.h"
#include "kernels/base/check.h"
#include "proto/grpc_status.h"

namespace clusterkv::cache_service {

void StreamRegistry::Add(const std::shared_ptr<OpenStream>& stream) {
  absl::Status ended;
  {
    absl::MutexLock lock(&mutex_);
    streams_[stream.get()] = stream;
    ended = ended_;
  }
  if (!ended.ok()) stream->EndStream(ended);
}

void StreamRegistry::Remove(OpenStream* stream) {
  absl::MutexLock lock(&mutex_);
  streams_.erase(stream);
}

void StreamRegistry::EndAll(const absl::Status& status) {
  std::vector<std::shared_ptr<OpenStream>> open;
  {
    absl::MutexLock lock(&mutex_);
    ended_ = status;
    for (const auto& [stream, weak] : streams_) {
      if (auto held = weak.lock()) open.push_back(std::move(held));
    }
  }
  for (const auto& stream : open) stream->EndStream(status);
}

bool StreamRegistry::AwaitNone(absl::Duration limit) {
  absl::MutexLock lock(&mutex_);
  const auto none = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return streams_.empty(); };
  return mutex_.AwaitWithTimeout(absl::Condition(&none), limit);
}

v1::Stats RpcContext::Stats() const {
  v1::Stats stats = shard->GetStats();
  metrics->AddTo(&stats);
  return stats;
}

void RpcContext::CountError(Method method, const absl::Status& status) const {
  const v1::ErrorReason reason = ReasonOf(status);
  shard->CountError(reason);
  const LogLevel level = reason == v1::INTERNAL_ERROR      ? LogLevel::kError
                         : reason == v1::CHECKSUM_MISMATCH ? LogLevel::kWarning
                                                           : LogLevel::kDebug;
  if (!LogEnabled(level)) return;
  Log(level, "call failed",
      {{"method", MethodName(method)},
       {"reason", v1::ErrorReason_Name(reason)},
       {"error", std::string(status.message())}});
}

RpcCall::RpcCall(const RpcContext& rpc, Method method)
    : rpc_(rpc), method_(method), start_(absl::Now()) {
  rpc_.metrics->CallStarted(method_);
}

RpcCall::~RpcCall() { CKV_CHECK(ended_) << "a call was dropped: " << MethodName(method_); }

grpc::Status RpcCall::End(const absl::Status& status) {
  CKV_CHECK(!ended_) << "answered twice: " << MethodName(method_);
  ended_ = true;
  if (!status.ok()) rpc_.CountError(method_, status);
  rpc_.metrics->CallEnded(method_, status.code(), absl::Now() - start_);
  return ToGrpcStatus(status);
}

absl::Time DeadlineOf(const RpcContext& rpc, grpc::CallbackServerContext* context) {
  const auto deadline = context->deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) {
    return absl::Now() + rpc.default_deadline;
  }
  return absl::FromChrono(deadline);
}

CallContext MakeCallContext(const RpcContext& rpc, grpc::CallbackServerContext* context) {
  return {DeadlineOf(rpc, context), [context] { return context->IsCancelled(); }};
}

std::shared_ptr<LaterUnary> LaterUnary::Start(const RpcContext& rpc, Method method,
                                              grpc::CallbackServerContext* context) {
  auto call = std::make_shared<LaterUnary>(Private(), rpc, method, context);
  call->self_ = call;
  call->ArmDeadline();
  return call;
}

LaterUnary::LaterUnary(Private, const RpcContext& rpc, Method method,
                       grpc::CallbackServerContext* context)
    : call_(rpc, method),
      deadline_(DeadlineOf(rpc, context)),
      cancelled_(std::make_shared<std::atomic<bool>>(false)) {}

CallContext LaterUnary::call_context() const {
  return {deadline_,
          [cancelled = cancelled_] { return cancelled->load(std::memory_order_relaxed); }};
}

void LaterUnary::ArmDeadline() {
  alarm_.Set(absl::ToChronoTime(deadline_), [weak = weak_from_this()](bool expired) {
    const std::shared_ptr<LaterUnary> call = weak.lock();
    if (!expired || call == nullptr) return;
    call->Answer(Error(v1::QUEUE_DEADLINE, "deadline: passed before the work was done"), [] {});
  });
}

void LaterUnary::FinishLocked(const absl::Status& status) {
  finished_ = true;
  Finish(call_.End(status));
}

void LaterUnary::OnCancel() {
  cancelled_->store(true, std::memory_order_relaxed);
  Answer(Error(v1::CANCELLED_BY_CLIENT, "call: cancelled by the client"), [] {});
}

void LaterUnary::OnDone() {
  alarm_.Cancel();
  self_.reset();
}

}  // namespace clusterkv::cache_service
