#include "tests/cache_service/shard_harness.h"

#include <cmath>
#include <cstdlib>
#include <random>
#include <thread>
#include <utility>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "kernels/base/element_type.h"

namespace clusterkv::cache_service {

int64_t TestKv::row_bytes() const {
  return int64_t{shape.kv_heads()} * shape.head_dim() *
         kernels::ElementBytes(static_cast<kernels::ElementType>(shape.element_type()));
}

KvChunkView TestKv::Chunk(int64_t layer, int64_t first_token, int64_t count) const {
  const Layer& rows = layers[static_cast<size_t>(layer)];
  const size_t begin = static_cast<size_t>(first_token * row_bytes());
  const size_t size = static_cast<size_t>(count * row_bytes());
  return {layer, first_token, count, std::string_view(rows.keys).substr(begin, size),
          std::string_view(rows.values).substr(begin, size)};
}

v1::KvShape TestShape(int64_t layers, v1::ElementType type) {
  v1::KvShape shape;
  shape.set_layers(static_cast<uint32_t>(layers));
  shape.set_kv_heads(2);
  shape.set_query_heads(4);
  shape.set_head_dim(32);
  shape.set_element_type(type);
  return shape;
}

TestKv MakeKv(const v1::KvShape& shape, int64_t tokens, uint64_t seed) {
  constexpr int64_t kTopics = 11;
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  const size_t width = size_t{shape.kv_heads()} * shape.head_dim();
  const auto type = static_cast<kernels::ElementType>(shape.element_type());
  TestKv kv;
  kv.shape = shape;
  kv.tokens = tokens;
  for (uint32_t layer = 0; layer < shape.layers(); ++layer) {
    std::vector<float> topics(kTopics * width);
    for (float& x : topics) x = normal(random);
    TestKv::Layer& rows = kv.layers.emplace_back();
    const auto pack = [&](std::string& packed, float noise) {
      std::vector<float> row(width);
      packed.resize(static_cast<size_t>(tokens * kv.row_bytes()));
      for (int64_t t = 0; t < tokens; ++t) {
        const size_t topic = static_cast<size_t>(random() % kTopics);
        for (size_t i = 0; i < width; ++i)
          row[i] = topics[topic * width + i] + noise * normal(random);
        kernels::FromFloat(row.data(), type, static_cast<int64_t>(width),
                           reinterpret_cast<std::byte*>(packed.data()) + t * kv.row_bytes());
      }
    };
    pack(rows.keys, 0.4f);
    pack(rows.values, 0.7f);
    rows.query_rms.resize(width);
    for (float& x : rows.query_rms) x = 0.1f + std::abs(normal(random));
  }
  return kv;
}

std::vector<float> MakeQueries(const v1::KvShape& shape, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> queries(size_t{shape.query_heads()} * shape.head_dim());
  for (float& x : queries) x = 1.5f * normal(random);
  return queries;
}

ShardOptions TestOptions() {
  ShardOptions options;
  options.arena_bytes = 32 << 20;
  options.page_bytes = 4 << 10;
  options.build_threads = 2;
  options.select_threads = 2;
  return options;
}

v1::SequenceHandle Handle(const std::string& name) {
  v1::SequenceHandle handle;
  handle.set_name(name);
  return handle;
}

v1::OpenSequenceRequest OpenRequest(const std::string& name, const TestKv& kv,
                                    int64_t prompt_tokens) {
  v1::OpenSequenceRequest request;
  request.set_name(name);
  *request.mutable_shape() = kv.shape;
  request.set_prompt_tokens(static_cast<uint32_t>(prompt_tokens));
  request.mutable_index()->set_segment_tokens(256);
  request.mutable_select()->set_budget_tokens(40);
  request.mutable_select()->set_coded_tokens(100);
  return request;
}

v1::AppendKvRequest AppendRequest(const std::string& name, const TestKv& kv, int64_t first_token,
                                  int64_t tokens) {
  v1::AppendKvRequest request;
  request.mutable_sequence()->set_name(name);
  request.set_first_token(static_cast<uint32_t>(first_token));
  request.set_tokens(static_cast<uint32_t>(tokens));
  for (uint32_t layer = 0; layer < kv.shape.layers(); ++layer) {
    const KvChunkView chunk = kv.Chunk(layer, first_token, tokens);
    v1::AppendKvRequest::Layer& rows = *request.add_layers();
    rows.set_layer(layer);
    rows.set_keys(chunk.keys.data(), chunk.keys.size());
    rows.set_values(chunk.values.data(), chunk.values.size());
  }
  return request;
}

std::function<std::unique_ptr<ShardDevice>()>& TestDevice() {
  static auto& make = *new std::function<std::unique_ptr<ShardDevice>()>;
  return make;
}

ShardHarness::ShardHarness(const ShardOptions& options)
    : shard_(Shard::Create(options, TestDevice() ? TestDevice()() : nullptr).value()) {}

ShardHarness::~ShardHarness() {
  WaitIdle();
  ExpectLedger();
}

void ShardHarness::WaitIdle() {
  const absl::Time deadline = absl::Now() + absl::Seconds(120);
  while (!shard_->Idle() && absl::Now() < deadline) std::this_thread::yield();
  EXPECT_TRUE(shard_->Idle());
}

void ShardHarness::ExpectLedger(bool checksums) {
  const v1::VerifyLedgerResponse response = shard_->VerifyLedger(checksums);
  EXPECT_TRUE(response.balanced()) << response.ShortDebugString();
}

absl::Status ShardHarness::Put(const std::string& name, const TestKv& kv, int64_t prompt_tokens,
                               int64_t chunk_tokens, bool statistics) {
  for (int64_t layer = 0; layer < kv.shape.layers(); ++layer) {
    if (statistics) {
      const absl::Status status = shard_->PutStatistics(
          Handle(name), layer, kv.layers[static_cast<size_t>(layer)].query_rms);
      if (!status.ok()) return status;
    }
    for (int64_t at = 0; at < prompt_tokens; at += chunk_tokens) {
      const absl::Status status = shard_->PutChunk(
          Handle(name), kv.Chunk(layer, at, std::min(chunk_tokens, prompt_tokens - at)));
      if (!status.ok()) return status;
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<v1::Sequence> ShardHarness::Seal(const std::string& name,
                                                const CallContext& context) {
  absl::StatusOr<v1::Sequence> answer;
  absl::Notification answered;
  shard_->Seal(Handle(name), context, [&](absl::StatusOr<v1::Sequence> sequence) {
    answer = std::move(sequence);
    answered.Notify();
  });
  answered.WaitForNotification();
  return answer;
}

v1::Sequence ShardHarness::Ready(const v1::OpenSequenceRequest& request, const TestKv& kv) {
  const auto opened = shard_->OpenSequence(request);
  EXPECT_TRUE(opened.ok()) << opened.status();
  const absl::Status put = Put(request.name(), kv, request.prompt_tokens());
  EXPECT_TRUE(put.ok()) << put;
  const auto sealed = Seal(request.name());
  EXPECT_TRUE(sealed.ok()) << sealed.status();
  return sealed.ok() ? *sealed : v1::Sequence();
}

SelectBatchAnswer ShardHarness::Select(std::vector<SelectCall> items, const CallContext& context,
                                       bool inline_ok) {
  SelectBatchAnswer answer;
  absl::Notification answered;
  shard_->Select(std::move(items), context, inline_ok, [&](SelectBatchAnswer batch) {
    answer = std::move(batch);
    answered.Notify();
  });
  answered.WaitForNotification();
  return answer;
}

SelectAnswer ShardHarness::SelectOne(const std::string& name, int64_t layer,
                                     std::vector<float> queries) {
  SelectCall call;
  call.sequence = Handle(name);
  call.layer = layer;
  call.queries = std::move(queries);
  std::vector<SelectCall> calls;
  calls.push_back(std::move(call));
  SelectBatchAnswer batch = Select(std::move(calls));
  return std::move(batch.items.front());
}

v1::ErrorReason Reason(const absl::Status& status) {
  return status.ok() ? v1::ERROR_REASON_UNSPECIFIED : ReasonOf(status);
}

std::string Metadata(const absl::Status& status, const std::string& key) {
  for (const auto& [name, value] : MetadataOf(status)) {
    if (name == key) return value;
  }
  return "";
}

}  // namespace clusterkv::cache_service
