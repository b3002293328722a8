// clusterkv.v1.AdminService over gRPC: for operators, on the admin port alone.
#ifndef CLUSTERKV_CACHE_SERVICE_RPC_ADMIN_SERVICE_RPC_H_
#define CLUSTERKV_CACHE_SERVICE_RPC_ADMIN_SERVICE_RPC_H_

#include <functional>
#include <utility>

#include "cache_service/rpc/rpc_context.h"
#include "clusterkv/v1/admin_service.grpc.pb.h"

namespace clusterkv::cache_service {

class AdminServiceRpc final : public v1::AdminService::CallbackService {
 public:
  // `rpc` outlives the service. `begin_drain` says NOT_SERVING and tells the shard; idempotent,
  // does not block.
  AdminServiceRpc(RpcContext& rpc, std::function<void()> begin_drain)
      : rpc_(rpc), begin_drain_(std::move(begin_drain)) {}

  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext*, const v1::DrainRequest*,
                                  v1::DrainResponse*) override;
  grpc::ServerUnaryReactor* GetStats(grpc::CallbackServerContext*, const v1::GetStatsRequest*,
                                     v1::Stats*) override;
  grpc::ServerUnaryReactor* VerifyLedger(grpc::CallbackServerContext*,
                                         const v1::VerifyLedgerRequest*,
                                         v1::VerifyLedgerResponse*) override;
  grpc::ServerUnaryReactor* EvictSequence(grpc::CallbackServerContext*,
                                          const v1::EvictSequenceRequest*,
                                          v1::EvictSequenceResponse*) override;
  grpc::ServerUnaryReactor* ForceReleaseWorker(grpc::CallbackServerContext*,
                                               const v1::ForceReleaseWorkerRequest*,
                                               v1::ForceReleaseWorkerResponse*) override;

 private:
  RpcContext& rpc_;
  const std::function<void()> begin_drain_;
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_RPC_ADMIN_SERVICE_RPC_H_
