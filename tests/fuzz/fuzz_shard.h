// A small shard for fuzzers, and what must hold whatever comes in.
#ifndef CLUSTERKV_TESTS_FUZZ_FUZZ_SHARD_H_
#define CLUSTERKV_TESTS_FUZZ_FUZZ_SHARD_H_

#include <google/protobuf/stubs/common.h>
#if GOOGLE_PROTOBUF_VERSION < 4022000
#include <google/protobuf/stubs/logging.h>
#endif

#include <memory>
#include <string>

#include "absl/synchronization/notification.h"
#include "cache_service/rpc/put_kv_stream.h"
#include "cache_service/rpc/rpc_context.h"
#include "cache_service/shard.h"
#include "kernels/base/check.h"

namespace clusterkv::cache_service::fuzz {

// Shape of the fuzzed sequences: small, so that inputs reach every field's edge.
constexpr uint32_t kLayers = 2, kKvHeads = 2, kQueryHeads = 4, kHeadDim = 16, kTokens = 64;
constexpr size_t kRowBytes = kKvHeads * kHeadDim * 4;

class FuzzShard {
 public:
  FuzzShard() {
#if GOOGLE_PROTOBUF_VERSION < 4022000
    google::protobuf::SetLogHandler(nullptr);
#endif
    ShardOptions options;
    options.arena_bytes = 8 << 20;
    options.page_bytes = 4 << 10;
    shard_ = Shard::Create(options).value();
    rpc_.shard = shard_.get();
    rpc_.metrics = &metrics_;
    rpc_.max_chunk_bytes = 64 << 10;
    rpc_.max_batch_items = 16;
  }

  RpcContext& rpc() { return rpc_; }
  Shard& shard() { return *shard_; }

  v1::SequenceHandle Open(const std::string& name) {
    v1::OpenSequenceRequest request;
    request.set_name(name);
    request.mutable_shape()->set_layers(kLayers);
    request.mutable_shape()->set_kv_heads(kKvHeads);
    request.mutable_shape()->set_query_heads(kQueryHeads);
    request.mutable_shape()->set_head_dim(kHeadDim);
    request.mutable_shape()->set_element_type(v1::ELEMENT_TYPE_FLOAT32);
    request.set_prompt_tokens(kTokens);
    request.mutable_index()->set_sink_tokens(4);
    request.mutable_select()->set_budget_tokens(16);
    request.mutable_select()->set_coded_tokens(32);
    const auto sequence = shard_->OpenSequence(request);
    CKV_CHECK(sequence.ok()) << sequence.status();
    return sequence->handle();
  }

  // Keys and values of `tokens` tokens: finite numbers that differ.
  static std::string Rows(size_t tokens) {
    std::string rows(tokens * kRowBytes, '\0');
    for (size_t i = 0; i < tokens * kKvHeads * kHeadDim; ++i) {
      const float number = static_cast<float>((i * 2654435761u) % 1000) / 500 - 1;
      rows.replace(4 * i, 4, reinterpret_cast<const char*>(&number), 4);
    }
    return rows;
  }

  v1::SequenceHandle MakeReady(const std::string& name) {
    const v1::SequenceHandle handle = Open(name);
    const std::string rows = Rows(kTokens);
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      KvChunkView chunk;
      chunk.layer = layer;
      chunk.tokens = kTokens;
      chunk.keys = chunk.values = rows;
      const absl::Status put = shard_->PutChunk(handle, chunk);
      CKV_CHECK(put.ok()) << put;
    }
    absl::Notification sealed;
    shard_->Seal(handle, {}, [&](absl::StatusOr<v1::Sequence> sequence) {
      CKV_CHECK(sequence.ok()) << sequence.status();
      sealed.Notify();
    });
    sealed.WaitForNotification();
    return handle;
  }

  void CheckLedger() {
    const v1::VerifyLedgerResponse ledger = shard_->VerifyLedger(/*checksums=*/true);
    CKV_CHECK(ledger.balanced()) << ledger.ShortDebugString();
  }

  // An error is one of the contract's: a reason, its code, and a message.
  static void CheckError(const absl::Status& status) {
    if (status.ok()) return;
    const v1::ErrorReason reason = ReasonOf(status);
    CKV_CHECK(reason != v1::ERROR_REASON_UNSPECIFIED && reason != v1::INTERNAL_ERROR) << status;
    CKV_CHECK(status.code() == CodeOf(reason)) << status;
    CKV_CHECK(!status.message().empty());
  }

 private:
  ServerMetrics metrics_;
  RpcContext rpc_;
  std::unique_ptr<Shard> shard_;
};

}  // namespace clusterkv::cache_service::fuzz

#endif  // CLUSTERKV_TESTS_FUZZ_FUZZ_SHARD_H_
