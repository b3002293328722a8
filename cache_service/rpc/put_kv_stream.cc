#include "cache_service/rpc/put_kv_stream.h"

#include <string>
#include <utility>

#include "absl/time/clock.h"
#include "cache_service/rpc/streams.h"
#include "cache_service/rpc/vectors.h"
#include "kernels/base/status_macros.h"
#include "proto/error.h"

namespace clusterkv::cache_service {

absl::Status PutKvTaker::Take(const v1::PutKvRequest& request) {
  CKV_RETURN_IF_ERROR(TakeSequence(request));
  if (request.has_statistics()) CKV_RETURN_IF_ERROR(TakeStatistics(request.statistics()));
  if (request.has_chunk()) CKV_RETURN_IF_ERROR(TakeChunk(request.chunk()));
  return absl::OkStatus();
}

absl::Status PutKvTaker::TakeSequence(const v1::PutKvRequest& request) {
  const v1::SequenceHandle& given = request.sequence();
  if (!named_) {
    if (given.name().empty()) {
      return Error(v1::INVALID_FIELD,
                   "sequence.name: expected in the stream's first message, got none",
                   {{"field", "sequence.name"}, {"expected", "a name"}, {"got", "none"}});
    }
    CKV_ASSIGN_OR_RETURN(const v1::Sequence sequence, caller_.shard->GetSequence(given));
    sequence_ = sequence.handle();
    named_ = true;
    return absl::OkStatus();
  }
  if (!request.has_sequence()) return absl::OkStatus();
  const bool same = given.name() == sequence_.name() &&
                    (given.generation() == 0 || given.generation() == sequence_.generation()) &&
                    (given.boot_id() == 0 || given.boot_id() == sequence_.boot_id());
  if (same) return absl::OkStatus();
  return Error(v1::INVALID_FIELD,
               "sequence: expected \"" + sequence_.name() +
                   "\", as in the stream's first message, got \"" + given.name() + "\"",
               {{"field", "sequence"}, {"expected", sequence_.name()}, {"got", given.name()}});
}

absl::Status PutKvTaker::TakeChunk(const v1::KvChunk& chunk) {
  const auto bytes = static_cast<int64_t>(chunk.keys().size() + chunk.values().size());
  if (bytes > rpc_.max_chunk_bytes) {
    const std::string expected = std::to_string(rpc_.max_chunk_bytes);
    const std::string got = std::to_string(bytes);
    return Error(v1::CHUNK_TOO_LARGE,
                 "chunk: expected keys and values of at most " + expected +
                     " bytes (max_chunk_bytes), got " + got,
                 {{"field", "chunk"}, {"expected", expected}, {"got", got}});
  }
  CKV_RETURN_IF_ERROR(caller_.AdmitBytes(bytes));
  KvChunkView view;
  view.layer = chunk.layer();
  view.first_token = chunk.first_token();
  view.tokens = chunk.tokens();
  view.keys = chunk.keys();
  view.values = chunk.values();
  view.checksum = chunk.checksum();
  const absl::Time start = absl::Now();
  CKV_RETURN_IF_ERROR(caller_.shard->PutChunk(sequence_, view));
  rpc_.metrics->RecordStage(Stage::kPut, absl::Now() - start);
  ++chunks_;
  bytes_ += static_cast<uint64_t>(bytes);
  return absl::OkStatus();
}

absl::Status PutKvTaker::TakeStatistics(const v1::LayerStatistics& statistics) {
  CKV_RETURN_IF_ERROR(
      ParseVector(statistics.query_rms(), "statistics.query_rms", v1::INVALID_FIELD, &numbers_));
  return caller_.shard->PutStatistics(sequence_, statistics.layer(), numbers_);
}

absl::Status PutKvTaker::End(v1::PutKvResponse* response) {
  if (!named_) {
    return Error(v1::STREAM_TRUNCATED,
                 "stream: expected a first message that names the sequence, got the end",
                 {{"field", "sequence"}, {"expected", "a message"}, {"got", "end of stream"}});
  }
  response->set_chunks(chunks_);
  response->set_bytes(bytes_);
  for (const uint32_t layer : caller_.shard->CompleteLayers(sequence_)) {
    response->add_complete_layers(layer);
  }
  return absl::OkStatus();
}

PutKvStream* PutKvStream::Start(const RpcContext& rpc, grpc::CallbackServerContext* context,
                                v1::PutKvResponse* response) {
  const absl::StatusOr<Caller> caller = rpc.Enter(context);
  auto* stream = new PutKvStream(rpc, caller.ok() ? *caller : Caller(), response);
  if (!caller.ok()) {
    absl::MutexLock lock(&stream->mutex_);
    stream->FinishWith(caller.status());
    return stream;
  }
  stream->StartRead(&stream->requests_[0]);
  return stream;
}

PutKvStream::PutKvStream(const RpcContext& rpc, const Caller& caller, v1::PutKvResponse* response)
    : response_(response), taker_(rpc, caller), call_(rpc, Method::kPutKv) {}

void PutKvStream::OnReadDone(bool ok) {
  int current = 0;
  {
    absl::MutexLock lock(&mutex_);
    if (!ok) {
      ended_ = true;
      if (!working_) FinishAtEnd();
      return;
    }
    if (working_) {
      next_is_in_ = true;
      return;
    }
    if (finished_) return;
    working_ = true;
    current = std::exchange(reading_, 1 - reading_);
    StartRead(&requests_[reading_]);
  }
  while (true) {
    const absl::Status status = taker_.Take(requests_[current]);
    absl::MutexLock lock(&mutex_);
    if (!status.ok()) {
      FinishWith(status);
      working_ = next_is_in_;  // a message that is in already must not be taken
      return;
    }
    if (!next_is_in_) {
      working_ = false;
      if (ended_) FinishAtEnd();
      return;
    }
    next_is_in_ = false;
    current = std::exchange(reading_, 1 - reading_);
    StartRead(&requests_[reading_]);
  }
}

void PutKvStream::FinishAtEnd() {
  if (finished_) return;
  FinishWith(cancelled_.load(std::memory_order_relaxed) ? CancelledByClient()
                                                        : taker_.End(response_));
}

void PutKvStream::FinishWith(const absl::Status& status) {
  if (finished_) return;
  finished_ = true;
  Finish(call_.End(status));
}

}  // namespace clusterkv::cache_service
