#include "cache_service/rpc/admin_service_rpc.h"

#include <memory>

#include "absl/time/clock.h"
#include "kernels/base/status_macros.h"
#include "proto/error.h"

namespace clusterkv::cache_service {
namespace {

constexpr absl::Duration kDrainPoll = absl::Milliseconds(10);

// Answers a Drain when the shard is idle or the time is up, looking every kDrainPoll.
class DrainWatch : public std::enable_shared_from_this<DrainWatch> {
 public:
  DrainWatch(const RpcContext& rpc, std::shared_ptr<LaterUnary> call, v1::DrainResponse* response)
      : rpc_(rpc),
        call_(std::move(call)),
        response_(response),
        limit_(absl::Now() + rpc.drain_timeout) {}

  void Look() {
    const bool cancelled = call_->call_context().is_cancelled();
    if (rpc_.shard->Idle() || absl::Now() >= limit_ || cancelled) {
      call_->Answer(absl::OkStatus(), [&] {
        const v1::Stats stats = rpc_.shard->GetStats();
        response_->set_sequences(stats.sequences());
        response_->set_attachments(stats.attachments());
      });
      alarm_.reset();  // whose callback holds this object
      return;
    }
    // A new alarm each time: an alarm may not be set again from its own callback.
    alarm_ = std::make_unique<grpc::Alarm>();
    alarm_->Set(absl::ToChronoTime(absl::Now() + kDrainPoll),
                [self = shared_from_this()](bool) { self->Look(); });
  }

 private:
  const RpcContext& rpc_;
  const std::shared_ptr<LaterUnary> call_;
  v1::DrainResponse* const response_;
  const absl::Time limit_;
  std::unique_ptr<grpc::Alarm> alarm_;
};

}  // namespace

grpc::ServerUnaryReactor* AdminServiceRpc::Drain(grpc::CallbackServerContext* context,
                                                 const v1::DrainRequest*,
                                                 v1::DrainResponse* response) {
  const std::shared_ptr<LaterUnary> call = LaterUnary::Start(rpc_, Method::kDrain, context);
  if (absl::Status status = rpc_.CheckAdmin(context); !status.ok()) {
    call->Answer(status, [] {});
    return call.get();
  }
  begin_drain_();
  std::make_shared<DrainWatch>(rpc_, call, response)->Look();
  return call.get();
}

grpc::ServerUnaryReactor* AdminServiceRpc::GetStats(grpc::CallbackServerContext* context,
                                                    const v1::GetStatsRequest*, v1::Stats* stats) {
  return AnswerAdmin(rpc_, Method::kGetStats, context, [&] {
    *stats = rpc_.Stats();
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* AdminServiceRpc::VerifyLedger(grpc::CallbackServerContext* context,
                                                        const v1::VerifyLedgerRequest* request,
                                                        v1::VerifyLedgerResponse* response) {
  return AnswerAdmin(rpc_, Method::kVerifyLedger, context, [&] {
    *response = rpc_.shard->VerifyLedger(request->checksums());
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* AdminServiceRpc::EvictSequence(grpc::CallbackServerContext* context,
                                                         const v1::EvictSequenceRequest* request,
                                                         v1::EvictSequenceResponse*) {
  return AnswerAdmin(rpc_, Method::kEvictSequence, context, [&]() -> absl::Status {
    CKV_ASSIGN_OR_RETURN(Shard* const shard, rpc_.ShardOf(request->tenant()));
    return shard->Evict(request->sequence(), request->force());
  });
}

grpc::ServerUnaryReactor* AdminServiceRpc::ForceReleaseWorker(
    grpc::CallbackServerContext* context, const v1::ForceReleaseWorkerRequest* request,
    v1::ForceReleaseWorkerResponse*) {
  return AnswerAdmin(rpc_, Method::kForceReleaseWorker, context, [&]() -> absl::Status {
    CKV_ASSIGN_OR_RETURN(Shard* const shard, rpc_.ShardOf(request->tenant()));
    CKV_RETURN_IF_ERROR(shard->Heartbeat(request->session_id()));  // is there such a one?
    shard->CloseSession(request->session_id(), /*now=*/true);
    return absl::OkStatus();
  });
}

}  // namespace clusterkv::cache_service
