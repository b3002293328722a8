// clusterkv.v1.SessionService over gRPC: one liveness stream per worker.
//
//   stream state   Hello           Heartbeat              end of stream    broken, or ended by the
//   server new            -> open         INVALID_FIELD, ends    ends             ends open
//   INVALID_FIELD   acknowledged           session ends     session may be resumed in its ttl
#ifndef CLUSTERKV_CACHE_SERVICE_RPC_SESSION_SERVICE_RPC_H_
#define CLUSTERKV_CACHE_SERVICE_RPC_SESSION_SERVICE_RPC_H_

#include "cache_service/rpc/rpc_context.h"
#include "clusterkv/v1/session_service.grpc.pb.h"

namespace clusterkv::cache_service {

class SessionServiceRpc final : public v1::SessionService::CallbackService {
 public:
  // `rpc` outlives the service.
  explicit SessionServiceRpc(RpcContext& rpc) : rpc_(rpc) {}
  grpc::ServerBidiReactor<v1::SessionRequest, v1::SessionResponse>* Session(
      grpc::CallbackServerContext* context) override;

 private:
  RpcContext& rpc_;
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_RPC_SESSION_SERVICE_RPC_H_
