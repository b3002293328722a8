#include "cache_service/rpc/cache_service_rpc.h"

#include <string>
#include <utility>

#include "cache_service/rpc/put_kv_stream.h"
#include "cache_service/rpc/vectors.h"
#include "kernels/base/element_type.h"
#include "kernels/base/host_id.h"
#include "kernels/base/status_macros.h"
#include "kernels/codec/record_codec.h"
#include "proto/error.h"

namespace clusterkv::cache_service {
namespace {

constexpr uint32_t kDefaultPageSize = 100, kMaxPageSize = 1000;
constexpr char kPageTokenPrefix[] = "after:";

// The next page begins after this name.
absl::StatusOr<std::string> ParsePageToken(const std::string& token) {
  if (token.empty()) return std::string();
  const std::string prefix = kPageTokenPrefix;
  if (token.compare(0, prefix.size(), prefix) == 0) return token.substr(prefix.size());
  return Error(v1::INVALID_FIELD,
               "page_token: expected what the last page answered, got \"" + token + "\"",
               {{"field", "page_token"}, {"got", token}});
}

absl::Status List(Shard& shard, const v1::ListSequencesRequest& request,
                  v1::ListSequencesResponse* response) {
  if (request.page_size() > kMaxPageSize) {
    const std::string got = std::to_string(request.page_size());
    return Error(v1::INVALID_FIELD, "page_size: expected 0 to 1000, got " + got,
                 {{"field", "page_size"}, {"expected", "0 to 1000"}, {"got", got}});
  }
  CKV_ASSIGN_OR_RETURN(const std::string after, ParsePageToken(request.page_token()));
  const size_t limit = request.page_size() == 0 ? kDefaultPageSize : request.page_size();
  std::vector<v1::Sequence> page =
      shard.ListSequences(request.prefix(), after, static_cast<int64_t>(limit) + 1);
  const bool more = page.size() > limit;
  if (more) page.resize(limit);
  if (more) {
    response->set_next_page_token(kPageTokenPrefix + page.back().handle().name());
  }
  for (v1::Sequence& sequence : page) *response->add_sequences() = std::move(sequence);
  return absl::OkStatus();
}

// Counts the links that the worker would have liked better than the one that it got.
void CountFallbacks(const RpcContext& rpc, const v1::AttachRequest& request,
                    const v1::AttachResponse& response) {
  for (const int number : request.links()) {
    const auto link = static_cast<v1::Link>(number);
    if (link == v1::LINK_GRPC || link == response.link()) break;
    rpc.metrics->CountLinkFallback(rpc.shard->WhyNoLink(link, request.host()));
  }
}

int64_t BytesOf(const v1::AppendKvRequest& request) {
  size_t bytes = 0;
  for (const v1::AppendKvRequest::Layer& layer : request.layers()) {
    bytes += layer.keys().size() + layer.values().size();
  }
  return static_cast<int64_t>(bytes);
}

// Errors: RATE_LIMITED; SEQUENCE_NOT_FOUND and the like.
absl::Status AdmitWindow(const Caller& caller, const v1::PutWindowRequest& request) {
  if (caller.tenant == nullptr) return absl::OkStatus();
  CKV_ASSIGN_OR_RETURN(const v1::Sequence sequence, caller.shard->GetSequence(request.sequence()));
  const v1::KvShape& shape = sequence.shape();
  const int64_t row_bytes =
      int64_t{shape.kv_heads()} * shape.head_dim() *
      kernels::ElementBytes(static_cast<kernels::ElementType>(shape.element_type()));
  return caller.AdmitBytes(2 * row_bytes * request.tokens());
}

// What `call` answers, moved into `response`.
template <typename T>
absl::Status Encode(absl::StatusOr<T> answer, T* response) {
  if (!answer.ok()) return std::move(answer).status();
  *response = *std::move(answer);
  return absl::OkStatus();
}

}  // namespace

grpc::ServerUnaryReactor* CacheServiceRpc::GetServerInfo(grpc::CallbackServerContext* context,
                                                         const v1::GetServerInfoRequest*,
                                                         v1::ServerInfo* info) {
  return AnswerNow(rpc_, Method::kGetServerInfo, context, [&](const Caller& caller) {
    const ShardOptions& options = caller.shard->options();
    info->set_boot_id(caller.shard->boot_id());
    info->set_version(rpc_.version);
    info->set_device(rpc_.device);
    for (const kernels::RecordCodec* codec : kernels::RecordCodecs()) {
      info->add_codecs(std::string(codec->name()));
    }
    for (const char* preset : {"clusterkv", "recall", "default"}) info->add_presets(preset);
    for (const v1::Link link : {v1::LINK_PEER, v1::LINK_NCCL}) {
      if (caller.shard->WhyNoLink(link, kernels::HostId()).empty()) info->add_links(link);
    }
    info->add_links(v1::LINK_GRPC);
    info->set_arena_bytes(static_cast<uint64_t>(options.arena_bytes));
    info->set_page_bytes(static_cast<uint64_t>(caller.shard->page_bytes()));
    info->set_max_chunk_bytes(static_cast<uint32_t>(rpc_.max_chunk_bytes));
    info->set_max_batch_items(static_cast<uint32_t>(rpc_.max_batch_items));
    info->set_max_sequence_tokens(static_cast<uint32_t>(options.max_sequence_tokens));
    info->set_draining(caller.shard->draining());
    info->set_session_ttl_ms(static_cast<uint32_t>(absl::ToInt64Milliseconds(options.session_ttl)));
    if (rpc_.shards != nullptr) {
      info->set_shard(rpc_.shards->own_name());
      for (v1::Shard& shard : rpc_.shards->Current()) *info->add_shards() = std::move(shard);
    }
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* CacheServiceRpc::OpenSequence(grpc::CallbackServerContext* context,
                                                        const v1::OpenSequenceRequest* request,
                                                        v1::Sequence* sequence) {
  return AnswerNow(rpc_, Method::kOpenSequence, context, [&](const Caller& caller) -> absl::Status {
    CKV_RETURN_IF_ERROR(
        rpc_.CheckTaker(*caller.shard, request->name(),
                        {request->without_shards().begin(), request->without_shards().end()}));
    return Encode(caller.shard->OpenSequence(*request), sequence);
  });
}

grpc::ServerReadReactor<v1::PutKvRequest>* CacheServiceRpc::PutKv(
    grpc::CallbackServerContext* context, v1::PutKvResponse* response) {
  return PutKvStream::Start(rpc_, context, response);
}

grpc::ServerUnaryReactor* CacheServiceRpc::ConnectIngest(grpc::CallbackServerContext* context,
                                                         const v1::ConnectIngestRequest* request,
                                                         v1::ConnectIngestResponse* response) {
  return AnswerNow(rpc_, Method::kConnectIngest, context,
                   [&](const Caller& caller) -> absl::Status {
                     CKV_RETURN_IF_ERROR(Encode(caller.shard->ConnectIngest(*request), response));
                     if (!response->reason().empty()) {
                       rpc_.metrics->CountLinkFallback(response->reason());
                     }
                     return absl::OkStatus();
                   });
}

grpc::ServerUnaryReactor* CacheServiceRpc::PutWindow(grpc::CallbackServerContext* context,
                                                     const v1::PutWindowRequest* request,
                                                     v1::PutWindowResponse*) {
  return AnswerNow(rpc_, Method::kPutWindow, context, [&](const Caller& caller) -> absl::Status {
    CKV_RETURN_IF_ERROR(AdmitWindow(caller, *request));
    if (request->has_statistics()) {
      std::vector<float> query_rms;
      CKV_RETURN_IF_ERROR(ParseVector(request->statistics().query_rms(), "statistics.query_rms",
                                      v1::INVALID_FIELD, &query_rms));
      CKV_RETURN_IF_ERROR(caller.shard->PutStatistics(request->sequence(),
                                                      request->statistics().layer(), query_rms));
    }
    const absl::Time start = absl::Now();
    CKV_RETURN_IF_ERROR(caller.shard->PutWindow(*request));
    rpc_.metrics->RecordStage(Stage::kPut, absl::Now() - start);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* CacheServiceRpc::SealSequence(grpc::CallbackServerContext* context,
                                                        const v1::SealSequenceRequest* request,
                                                        v1::Sequence* sequence) {
  const std::shared_ptr<LaterUnary> call = LaterUnary::Start(rpc_, Method::kSealSequence, context);
  const absl::StatusOr<Caller> caller = rpc_.Enter(context);
  if (!caller.ok()) {
    call->Answer(caller.status(), [] {});
    return call.get();
  }
  caller->shard->Seal(request->sequence(), call->call_context(),
                      [call, sequence](absl::StatusOr<v1::Sequence> sealed) {
                        call->Answer(sealed.status(), [&] { *sequence = *std::move(sealed); });
                      });
  return call.get();
}

grpc::ServerUnaryReactor* CacheServiceRpc::GetSequence(grpc::CallbackServerContext* context,
                                                       const v1::GetSequenceRequest* request,
                                                       v1::Sequence* sequence) {
  return AnswerNow(rpc_, Method::kGetSequence, context, [&](const Caller& caller) {
    return Encode(caller.shard->GetSequence(request->sequence()), sequence);
  });
}

grpc::ServerUnaryReactor* CacheServiceRpc::ListSequences(grpc::CallbackServerContext* context,
                                                         const v1::ListSequencesRequest* request,
                                                         v1::ListSequencesResponse* response) {
  return AnswerNow(rpc_, Method::kListSequences, context,
                   [&](const Caller& caller) { return List(*caller.shard, *request, response); });
}

grpc::ServerUnaryReactor* CacheServiceRpc::ForkSequence(grpc::CallbackServerContext* context,
                                                        const v1::ForkSequenceRequest* request,
                                                        v1::Sequence* sequence) {
  return AnswerNow(rpc_, Method::kForkSequence, context, [&](const Caller& caller) {
    return Encode(caller.shard->Fork(*request), sequence);
  });
}

grpc::ServerUnaryReactor* CacheServiceRpc::ReleaseSequence(
    grpc::CallbackServerContext* context, const v1::ReleaseSequenceRequest* request,
    v1::ReleaseSequenceResponse*) {
  const std::string& name = request->sequence().name();
  return AnswerNow(rpc_, Method::kReleaseSequence, context,
                   [&](const Caller& caller) -> absl::Status {
                     CKV_RETURN_IF_ERROR(rpc_.CheckOwner(*caller.shard, name));
                     return caller.shard->Release(request->sequence());
                   });
}

grpc::ServerUnaryReactor* CacheServiceRpc::Attach(grpc::CallbackServerContext* context,
                                                  const v1::AttachRequest* request,
                                                  v1::AttachResponse* response) {
  return AnswerNow(rpc_, Method::kAttach, context, [&](const Caller& caller) -> absl::Status {
    CKV_RETURN_IF_ERROR(Encode(caller.shard->Attach(*request), response));
    CountFallbacks(rpc_, *request, *response);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* CacheServiceRpc::ConnectLink(grpc::CallbackServerContext* context,
                                                       const v1::ConnectLinkRequest* request,
                                                       v1::ConnectLinkResponse* response) {
  return AnswerNow(rpc_, Method::kConnectLink, context, [&](const Caller& caller) -> absl::Status {
    CKV_RETURN_IF_ERROR(Encode(caller.shard->ConnectLink(*request), response));
    if (!response->link_reason().empty()) {
      rpc_.metrics->CountLinkFallback(response->link_reason());
    }
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* CacheServiceRpc::ConnectResident(
    grpc::CallbackServerContext* context, const v1::ConnectResidentRequest* request,
    v1::ConnectResidentResponse* response) {
  return AnswerNow(rpc_, Method::kConnectResident, context,
                   [&](const Caller& caller) -> absl::Status {
                     CKV_RETURN_IF_ERROR(Encode(caller.shard->ConnectResident(*request), response));
                     if (!response->reason().empty())
                       rpc_.metrics->CountLinkFallback(response->reason());
                     return absl::OkStatus();
                   });
}

grpc::ServerUnaryReactor* CacheServiceRpc::RenewResident(grpc::CallbackServerContext* context,
                                                         const v1::RenewResidentRequest* request,
                                                         v1::RenewResidentResponse* response) {
  return AnswerNow(rpc_, Method::kRenewResident, context, [&](const Caller& caller) {
    return Encode(caller.shard->RenewResident(*request), response);
  });
}

grpc::ServerUnaryReactor* CacheServiceRpc::DisconnectResident(
    grpc::CallbackServerContext* context, const v1::DisconnectResidentRequest* request,
    v1::DisconnectResidentResponse*) {
  return AnswerNow(rpc_, Method::kDisconnectResident, context, [&](const Caller& caller) {
    caller.shard->DisconnectResident(request->resident_id());
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* CacheServiceRpc::Detach(grpc::CallbackServerContext* context,
                                                  const v1::DetachRequest* request,
                                                  v1::DetachResponse*) {
  return AnswerNow(rpc_, Method::kDetach, context, [&](const Caller& caller) {
    return caller.shard->Detach(request->attachment_id());
  });
}

grpc::ServerUnaryReactor* CacheServiceRpc::AppendKv(grpc::CallbackServerContext* context,
                                                    const v1::AppendKvRequest* request,
                                                    v1::AppendKvResponse* response) {
  return AnswerNow(rpc_, Method::kAppendKv, context, [&](const Caller& caller) -> absl::Status {
    const absl::Time start = absl::Now();
    if (caller.tenant != nullptr) CKV_RETURN_IF_ERROR(caller.AdmitBytes(BytesOf(*request)));
    absl::Status status = Encode(caller.shard->Append(*request), response);
    rpc_.metrics->RecordStage(Stage::kAppend, absl::Now() - start);
    return status;
  });
}

}  // namespace clusterkv::cache_service
