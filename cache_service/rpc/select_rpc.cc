// Select and recall: the handlers of the decode path.
#include <algorithm>
#include <string>
#include <utility>

#include "absl/time/clock.h"
#include "cache_service/errors.h"
#include "cache_service/rpc/cache_service_rpc.h"
#include "cache_service/rpc/select_messages.h"
#include "cache_service/rpc/streams.h"
#include "proto/error.h"

namespace clusterkv::cache_service {
namespace {

// A message that its tenant may not send yet is answered item by item: the stream goes on.
void AdmitParsed(const Caller& caller, ParsedSelect* parsed) {
  const absl::Status status = caller.AdmitCall();
  if (status.ok()) return;
  for (absl::Status& item : parsed->statuses) item = CopyOf(status);
  parsed->calls.clear();
}

// A request's selects, run together: what every exchange of the decode path begins with.
template <typename RequestType>
class SelectsOf {
 public:
  using Request = RequestType;
  Request request;

  absl::Status Begin(const RpcContext& rpc, const Caller& caller, CallContext context,
                     bool inline_ok, std::function<void()> ready) {
    rpc_ = &rpc;
    if (absl::Status status = ParseSelect(rpc, request, &parsed_); !status.ok()) return status;
    AdmitParsed(caller, &parsed_);
    if (parsed_.calls.empty()) {
      ready();
      return absl::OkStatus();
    }
    const bool single = parsed_.calls.size() == 1;
    std::vector<SelectCall> calls = std::move(parsed_.calls);
    caller.shard->Select(std::move(calls), context, inline_ok && single,
                         [this, ready = std::move(ready)](SelectBatchAnswer answer) {
                           answer_ = std::move(answer);
                           ready();
                         });
    return absl::OkStatus();
  }

 protected:
  const RpcContext* rpc_ = nullptr;
  ParsedSelect parsed_;
  SelectBatchAnswer answer_;
};

// One request of StreamSelect and its answer.
class SelectExchange : public SelectsOf<v1::SelectClustersRequest> {
 public:
  using Response = v1::SelectClustersResponse;

  bool Next(Response* response) {
    EncodeSelection(*rpc_, Method::kStreamSelect, parsed_, answer_, response);
    response->set_request_id(request.request_id());
    return true;
  }

  void Clear() { answer_ = {}; }
};

// One request of SelectAndRecall, unary or on a stream, and its answer: the selection and as many
// records as fit into the first message, the rest in the next ones.
template <Method kMethod>
class RecallExchange : public SelectsOf<v1::SelectAndRecallRequest> {
 public:
  using Response = v1::SelectAndRecallResponse;

  bool Next(Response* response) {
    const absl::Time start = absl::Now();
    if (first_) {
      first_ = false;
      EncodeSelection(*rpc_, kMethod, parsed_, answer_, response->mutable_selection());
      response->mutable_selection()->set_request_id(request.request_id());
      AddRecalls(parsed_, answer_, &packer_);
      for (const SelectAnswer& item : answer_.items) {
        if (item.by_link) response->set_link_generation(item.link_generation);
      }
    }
    int64_t room = kMaxRecordBytesPerMessage;
    while (!packer_.done() && room > 0) room -= packer_.Next(room, response->add_records());
    packing_ += absl::Now() - start;
    response->set_request_id(request.request_id());
    if (!packer_.done()) return false;
    response->set_last(true);
    response->set_recall_us(static_cast<uint32_t>(absl::ToInt64Microseconds(packing_)));
    rpc_->metrics->RecordStage(Stage::kPack, packing_);
    return true;
  }

  void Clear() {
    answer_ = {};  // lets go of the pins
    packer_.Clear();
    first_ = true;
    packing_ = absl::ZeroDuration();
  }

 private:
  RecordPacker packer_;
  bool first_ = true;
  absl::Duration packing_ = absl::ZeroDuration();
};

// A unary select under way: freed when its answer is out.
struct UnarySelect {
  UnarySelect(const RpcContext& rpc_context, grpc::CallbackServerContext* context)
      : rpc(rpc_context),
        call(rpc_context, Method::kSelectClusters),
        reactor(context->DefaultReactor()) {}

  void Finish(const absl::Status& status) { reactor->Finish(call.End(status)); }

  void Answer(const SelectBatchAnswer& answer, const v1::SelectClustersRequest& request,
              v1::SelectClustersResponse* response) {
    // The shorthand is for people: what is wrong is told as the call's own status.
    if (parsed.shorthand) {
      const absl::Status& status =
          parsed.statuses[0].ok() ? answer.items[0].status : parsed.statuses[0];
      if (!status.ok()) return Finish(status);
    }
    EncodeSelection(rpc, Method::kSelectClusters, parsed, answer, response);
    response->set_request_id(request.request_id());
    Finish(absl::OkStatus());
  }

  const RpcContext& rpc;
  RpcCall call;
  grpc::ServerUnaryReactor* const reactor;
  ParsedSelect parsed;
};

// The steady zone of layer after layer, each cut into messages.
class SteadyZoneSource {
 public:
  SteadyZoneSource(const RpcContext& rpc, Shard& shard, const v1::RecallClustersRequest& request)
      : rpc_(rpc), shard_(shard), sequence_(request.sequence()) {
    layers_.assign(request.layers().begin(), request.layers().end());
    if (layers_.empty()) layers_.push_back(request.layer());
  }

  absl::StatusOr<bool> Next(v1::RecordChunk* chunk) {
    const absl::Time start = absl::Now();
    while (head_ == zone_.heads.size()) {
      if (layer_ == layers_.size()) return false;
      absl::StatusOr<Shard::SteadyZone> zone = shard_.GetSteadyZone(sequence_, layers_[layer_]);
      if (!zone.ok()) return zone.status();
      ++layer_;
      zone_ = *std::move(zone);
      head_ = zone_.positions.empty() ? zone_.heads.size() : 0;
      token_ = 0;
    }
    Fill(chunk);
    rpc_.metrics->RecordStage(Stage::kPack, absl::Now() - start);
    return true;
  }

 private:
  void Fill(v1::RecordChunk* chunk) {
    const std::string& bytes = zone_.heads[head_];
    const size_t tokens = zone_.positions.size();
    const size_t token_bytes = bytes.size() / tokens;
    const size_t count =
        std::min(tokens - token_, std::max<size_t>(1, kMaxRecordBytesPerMessage / token_bytes));
    chunk->set_layer(layers_[layer_ - 1]);
    chunk->set_kv_head(static_cast<uint32_t>(head_));
    for (size_t i = token_; i < token_ + count; ++i) {
      chunk->add_positions(static_cast<uint32_t>(zone_.positions[i]));
    }
    chunk->set_records(bytes.data() + token_ * token_bytes, count * token_bytes);
    chunk->set_checksum(RecordsChecksum(chunk->records()));
    token_ += count;
    if (token_ < tokens) return;
    token_ = 0;
    ++head_;
  }

  const RpcContext& rpc_;
  Shard& shard_;
  const v1::SequenceHandle sequence_;
  std::vector<uint32_t> layers_;
  size_t layer_ = 0;  // next one to fetch
  Shard::SteadyZone zone_;
  size_t head_ = 0, token_ = 0;
};

// Records that a request names.
class RecordSource {
 public:
  RecordSource(const RpcContext& rpc, uint32_t layer, Shard::RecallAnswer answer)
      : rpc_(rpc), answer_(std::move(answer)) {
    for (const Shard::Recalled& head : answer_.heads) {
      packer_.Add({0, layer, static_cast<uint32_t>(head.kv_head), &head.positions, &head.records,
                   answer_.record_bytes, /*by_link=*/false});
    }
  }

  absl::StatusOr<bool> Next(v1::RecordChunk* chunk) {
    if (packer_.done()) return false;
    const absl::Time start = absl::Now();
    packer_.Next(kMaxRecordBytesPerMessage, chunk);
    rpc_.metrics->RecordStage(Stage::kPack, absl::Now() - start);
    return true;
  }

 private:
  const RpcContext& rpc_;
  const Shard::RecallAnswer answer_;
  RecordPacker packer_;
};

}  // namespace

grpc::ServerUnaryReactor* CacheServiceRpc::SelectClusters(grpc::CallbackServerContext* context,
                                                          const v1::SelectClustersRequest* request,
                                                          v1::SelectClustersResponse* response) {
  auto select = std::make_shared<UnarySelect>(rpc_, context);
  grpc::ServerUnaryReactor* const reactor = select->reactor;
  const absl::StatusOr<Caller> caller = rpc_.Enter(context);
  if (!caller.ok()) {
    select->Finish(caller.status());
    return reactor;
  }
  if (absl::Status status = ParseSelect(rpc_, *request, &select->parsed); !status.ok()) {
    select->Finish(status);
    return reactor;
  }
  std::vector<SelectCall> calls = std::move(select->parsed.calls);
  if (calls.empty()) {
    select->Answer({}, *request, response);
    return reactor;
  }
  const bool single = calls.size() == 1;
  caller->shard->Select(std::move(calls), MakeCallContext(rpc_, context), single,
                        [select, request, response](SelectBatchAnswer answer) {
                          select->Answer(answer, *request, response);
                        });
  return reactor;
}

grpc::ServerBidiReactor<v1::SelectClustersRequest, v1::SelectClustersResponse>*
CacheServiceRpc::StreamSelect(grpc::CallbackServerContext* context) {
  return ExchangeStream<SelectExchange>::Start(rpc_, Method::kStreamSelect, context);
}

grpc::ServerBidiReactor<v1::SelectAndRecallRequest, v1::SelectAndRecallResponse>*
CacheServiceRpc::StreamSelectAndRecall(grpc::CallbackServerContext* context) {
  return ExchangeStream<RecallExchange<Method::kStreamSelectAndRecall>>::Start(
      rpc_, Method::kStreamSelectAndRecall, context);
}

grpc::ServerWriteReactor<v1::SelectAndRecallResponse>* CacheServiceRpc::SelectAndRecall(
    grpc::CallbackServerContext* context, const v1::SelectAndRecallRequest* request) {
  using Exchange = RecallExchange<Method::kSelectAndRecall>;
  const auto stream =
      WriteStream<v1::SelectAndRecallResponse>::Start(rpc_, Method::kSelectAndRecall, context);
  const absl::StatusOr<Caller> caller = rpc_.CallerOf(context);
  if (!caller.ok()) {
    stream->Fail(caller.status());
    return stream.get();
  }
  auto exchange = std::make_shared<Exchange>();
  exchange->request = *request;
  const absl::Status begun =
      exchange->Begin(rpc_, *caller, stream->call_context(), true, [stream, exchange] {
        stream->Run([exchange, last = false](
                        v1::SelectAndRecallResponse* message) mutable -> absl::StatusOr<bool> {
          if (last) return false;
          last = exchange->Next(message);
          return true;
        });
      });
  if (!begun.ok()) stream->Fail(begun);
  return stream.get();
}

grpc::ServerWriteReactor<v1::RecordChunk>* CacheServiceRpc::RecallClusters(
    grpc::CallbackServerContext* context, const v1::RecallClustersRequest* request) {
  const auto stream = WriteStream<v1::RecordChunk>::Start(rpc_, Method::kRecallClusters, context);
  const absl::StatusOr<Caller> caller = rpc_.Enter(context);
  if (!caller.ok()) {
    stream->Fail(caller.status());
    return stream.get();
  }
  if (request->steady_zone()) {
    auto source = std::make_shared<SteadyZoneSource>(rpc_, *caller->shard, *request);
    stream->Run([source](v1::RecordChunk* chunk) { return source->Next(chunk); });
    return stream.get();
  }
  absl::StatusOr<Shard::RecallAnswer> answer = caller->shard->Recall(*request);
  if (!answer.ok()) {
    stream->Fail(answer.status());
    return stream.get();
  }
  auto source = std::make_shared<RecordSource>(rpc_, request->layer(), *std::move(answer));
  stream->Run([source](v1::RecordChunk* chunk) { return source->Next(chunk); });
  return stream.get();
}

grpc::ServerWriteReactor<v1::IndexChunk>* CacheServiceRpc::GetIndex(
    grpc::CallbackServerContext* context, const v1::GetIndexRequest* request) {
  const auto stream = WriteStream<v1::IndexChunk>::Start(rpc_, Method::kGetIndex, context);
  const absl::StatusOr<Caller> caller = rpc_.Enter(context);
  if (!caller.ok()) {
    stream->Fail(caller.status());
    return stream.get();
  }
  absl::StatusOr<std::vector<v1::IndexChunk>> index = caller->shard->GetIndex(*request);
  if (!index.ok()) {
    stream->Fail(index.status());
    return stream.get();
  }
  auto chunks = std::make_shared<std::vector<v1::IndexChunk>>();
  for (v1::IndexChunk& chunk : *index) {
    SplitIndexChunk(std::move(chunk), kMaxRecordBytesPerMessage, chunks.get());
  }
  stream->Run([chunks, next = size_t{0}](v1::IndexChunk* chunk) mutable -> absl::StatusOr<bool> {
    if (next == chunks->size()) return false;
    *chunk = std::move((*chunks)[next++]);
    return true;
  });
  return stream.get();
}

}  // namespace clusterkv::cache_service
