// clusterkv.v1.CacheService over gRPC: parse, validate, call the shard, encode.
//
// Handlers run on gRPC's threads and never wait: what takes long answers by callback. The one piece
// of work they do themselves is what is cheaper than handing it on: copying a chunk into the arena,
// packing records, and, when the shard is idle, a single select.
#ifndef CLUSTERKV_CACHE_SERVICE_RPC_CACHE_SERVICE_RPC_H_
#define CLUSTERKV_CACHE_SERVICE_RPC_CACHE_SERVICE_RPC_H_

#include "cache_service/rpc/rpc_context.h"
#include "clusterkv/v1/cache_service.grpc.pb.h"

namespace clusterkv::cache_service {

class CacheServiceRpc final : public v1::CacheService::CallbackService {
 public:
  // `rpc` outlives the service.
  explicit CacheServiceRpc(RpcContext& rpc) : rpc_(rpc) {}

  // --- sequences (cache_service_rpc.cc)
  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext*,
                                          const v1::GetServerInfoRequest*,
                                          v1::ServerInfo*) override;
  grpc::ServerUnaryReactor* OpenSequence(grpc::CallbackServerContext*,
                                         const v1::OpenSequenceRequest*, v1::Sequence*) override;
  grpc::ServerReadReactor<v1::PutKvRequest>* PutKv(grpc::CallbackServerContext*,
                                                   v1::PutKvResponse*) override;
  grpc::ServerUnaryReactor* ConnectIngest(grpc::CallbackServerContext*,
                                          const v1::ConnectIngestRequest*,
                                          v1::ConnectIngestResponse*) override;
  grpc::ServerUnaryReactor* PutWindow(grpc::CallbackServerContext*, const v1::PutWindowRequest*,
                                      v1::PutWindowResponse*) override;
  grpc::ServerUnaryReactor* SealSequence(grpc::CallbackServerContext*,
                                         const v1::SealSequenceRequest*, v1::Sequence*) override;
  grpc::ServerUnaryReactor* GetSequence(grpc::CallbackServerContext*, const v1::GetSequenceRequest*,
                                        v1::Sequence*) override;
  grpc::ServerUnaryReactor* ListSequences(grpc::CallbackServerContext*,
                                          const v1::ListSequencesRequest*,
                                          v1::ListSequencesResponse*) override;
  grpc::ServerUnaryReactor* ForkSequence(grpc::CallbackServerContext*,
                                         const v1::ForkSequenceRequest*, v1::Sequence*) override;
  grpc::ServerUnaryReactor* ReleaseSequence(grpc::CallbackServerContext*,
                                            const v1::ReleaseSequenceRequest*,
                                            v1::ReleaseSequenceResponse*) override;
  grpc::ServerUnaryReactor* Attach(grpc::CallbackServerContext*, const v1::AttachRequest*,
                                   v1::AttachResponse*) override;
  grpc::ServerUnaryReactor* ConnectLink(grpc::CallbackServerContext*, const v1::ConnectLinkRequest*,
                                        v1::ConnectLinkResponse*) override;
  grpc::ServerUnaryReactor* ConnectResident(grpc::CallbackServerContext*,
                                            const v1::ConnectResidentRequest*,
                                            v1::ConnectResidentResponse*) override;
  grpc::ServerUnaryReactor* RenewResident(grpc::CallbackServerContext*,
                                          const v1::RenewResidentRequest*,
                                          v1::RenewResidentResponse*) override;
  grpc::ServerUnaryReactor* DisconnectResident(grpc::CallbackServerContext*,
                                               const v1::DisconnectResidentRequest*,
                                               v1::DisconnectResidentResponse*) override;
  grpc::ServerUnaryReactor* Detach(grpc::CallbackServerContext*, const v1::DetachRequest*,
                                   v1::DetachResponse*) override;
  grpc::ServerUnaryReactor* AppendKv(grpc::CallbackServerContext*, const v1::AppendKvRequest*,
                                     v1::AppendKvResponse*) override;

  // --- select and recall (select_rpc.cc)
  grpc::ServerUnaryReactor* SelectClusters(grpc::CallbackServerContext*,
                                           const v1::SelectClustersRequest*,
                                           v1::SelectClustersResponse*) override;
  grpc::ServerBidiReactor<v1::SelectClustersRequest, v1::SelectClustersResponse>* StreamSelect(
      grpc::CallbackServerContext*) override;
  grpc::ServerWriteReactor<v1::RecordChunk>* RecallClusters(
      grpc::CallbackServerContext*, const v1::RecallClustersRequest*) override;
  grpc::ServerWriteReactor<v1::SelectAndRecallResponse>* SelectAndRecall(
      grpc::CallbackServerContext*, const v1::SelectAndRecallRequest*) override;
  grpc::ServerBidiReactor<v1::SelectAndRecallRequest, v1::SelectAndRecallResponse>*
  StreamSelectAndRecall(grpc::CallbackServerContext*) override;
  grpc::ServerWriteReactor<v1::IndexChunk>* GetIndex(grpc::CallbackServerContext*,
                                                     const v1::GetIndexRequest*) override;

 private:
  RpcContext& rpc_;
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_RPC_CACHE_SERVICE_RPC_H_
