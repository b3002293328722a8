#include "cache_service/rpc/rpc_context.h"

#include <grpc/grpc_security_constants.h>
#include <grpcpp/security/auth_context.h>

#include <chrono>
#include <vector>

#include "absl/time/clock.h"
#include "cache_service/telemetry/log.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
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

namespace {

// Of the certificate that the client showed: its URIs, or where it has none its common name.
std::vector<std::string> IdentitiesOf(grpc::CallbackServerContext* context) {
  const std::shared_ptr<const grpc::AuthContext> peer = context->auth_context();
  if (peer == nullptr || !peer->IsPeerAuthenticated()) return {};
  for (const char* property : {GRPC_PEER_URI_PROPERTY_NAME, GRPC_X509_CN_PROPERTY_NAME}) {
    std::vector<std::string> identities;
    for (const grpc::string_ref& value : peer->FindPropertyValues(property)) {
      identities.emplace_back(value.data(), value.size());
    }
    if (!identities.empty()) return identities;
  }
  return {""};  // a certificate without a name
}

absl::Status IdentityRefused(const std::vector<std::string>& identities, const char* expected) {
  const std::string got = identities.empty() ? "no certificate" : identities.front();
  return Error(v1::IDENTITY_REFUSED,
               std::string("identity: expected ") + expected + ", got \"" + got + "\"",
               {{"field", "identity"}, {"expected", expected}, {"got", got}});
}

absl::Status NotOwner(const std::string& sequence, const v1::Shard& owner) {
  return Error(
      v1::NOT_OWNER,
      "sequence " + sequence + " is not here; it belongs to shard " + owner.name() + " at " +
          owner.address(),
      {{"sequence", sequence}, {"ownerShard", owner.name()}, {"ownerAddress", owner.address()}});
}

bool Holds(Shard& shard, const std::string& sequence) {
  v1::SequenceHandle handle;
  handle.set_name(sequence);
  const absl::Status held = shard.GetSequence(handle).status();
  return held.ok() || ReasonOf(held) != v1::SEQUENCE_NOT_FOUND;
}

}  // namespace

absl::StatusOr<Caller> RpcContext::CallerOf(grpc::CallbackServerContext* context) const {
  if (tenants == nullptr) return Caller{shard, nullptr};
  const std::vector<std::string> identities = IdentitiesOf(context);
  Tenant* const tenant =
      identities.empty() ? &tenants->default_tenant() : tenants->OfIdentities(identities);
  if (tenant == nullptr) return IdentityRefused(identities, "a tenant's");
  return Caller{&tenant->shard(), tenant};
}

absl::StatusOr<Caller> RpcContext::Enter(grpc::CallbackServerContext* context) const {
  absl::StatusOr<Caller> caller = CallerOf(context);
  if (!caller.ok()) return caller;
  CKV_RETURN_IF_ERROR(caller->AdmitCall());
  return caller;
}

absl::Status RpcContext::CheckAdmin(grpc::CallbackServerContext* context) const {
  if (admin_identities.empty()) return absl::OkStatus();
  const std::vector<std::string> identities = IdentitiesOf(context);
  for (const std::string& pattern : admin_identities) {
    for (const std::string& identity : identities) {
      if (IdentityMatches(pattern, identity)) return absl::OkStatus();
    }
  }
  return IdentityRefused(identities, "one of admin_identities");
}

absl::StatusOr<Shard*> RpcContext::ShardOf(const std::string& tenant) const {
  if (tenants == nullptr && tenant.empty()) return shard;
  Tenant* const found = tenants == nullptr
                            ? nullptr
                            : tenants->OfName(tenant.empty() ? kDefaultTenant : tenant.c_str());
  if (found != nullptr) return &found->shard();
  return Error(v1::INVALID_FIELD, "tenant: expected one that is configured, got \"" + tenant + "\"",
               {{"field", "tenant"}, {"expected", "one that is configured"}, {"got", tenant}});
}

absl::Status RpcContext::CheckOwner(Shard& shard, const std::string& sequence) const {
  if (shards == nullptr) return absl::OkStatus();
  const std::optional<v1::Shard> owner = shards->OtherOwner(sequence);
  return owner.has_value() && !Holds(shard, sequence) ? NotOwner(sequence, *owner)
                                                      : absl::OkStatus();
}

absl::Status RpcContext::CheckTaker(Shard& shard, const std::string& sequence,
                                    const std::vector<std::string>& without) const {
  if (shards == nullptr) return absl::OkStatus();
  const std::optional<v1::Shard> taker = shards->OtherTaker(sequence, without);
  return taker.has_value() && !Holds(shard, sequence) ? NotOwner(sequence, *taker)
                                                      : absl::OkStatus();
}

absl::Status RpcContext::Placed(const absl::Status& status) const {
  if (status.ok() || shards == nullptr || ReasonOf(status) != v1::SEQUENCE_NOT_FOUND) return status;
  for (const auto& [key, sequence] : MetadataOf(status)) {
    if (key != "sequence") continue;
    const std::optional<v1::Shard> owner = shards->OtherOwner(sequence);
    return owner.has_value() ? NotOwner(sequence, *owner) : status;
  }
  return status;
}

v1::Stats RpcContext::Stats() const {
  v1::Stats stats = shard->GetStats();
  metrics->AddTo(&stats);
  if (tenants != nullptr) tenants->AddTo(&stats);
  if (shards != nullptr) shards->AddTo(&stats);
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

grpc::Status RpcCall::End(const absl::Status& answer) {
  const absl::Status status = rpc_.Placed(answer);
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
