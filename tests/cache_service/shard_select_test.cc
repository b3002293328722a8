// Select, recall and attachments of a shard: the whole way from chunks to records.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <xxhash.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>

#include "kernels/attention/correction.h"
#include "kernels/base/element_type.h"
#include "kernels/codec/record_codec.h"
#include "tests/cache_service/shard_harness.h"

namespace clusterkv::cache_service {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr int64_t kPrompt = 700;

// One token's K then V of one KV head, as they came: the raw record.
std::string RawRecord(const TestKv& kv, int64_t layer, int64_t head, int64_t token) {
  const size_t bytes = static_cast<size_t>(kv.row_bytes()) / kv.shape.kv_heads();
  const size_t at = static_cast<size_t>(token * kv.row_bytes()) + static_cast<size_t>(head) * bytes;
  const TestKv::Layer& rows = kv.layers[static_cast<size_t>(layer)];
  return rows.keys.substr(at, bytes) + rows.values.substr(at, bytes);
}

SelectCall CallFor(const std::string& name, int64_t layer, std::vector<float> queries) {
  SelectCall call;
  call.sequence = Handle(name);
  call.layer = layer;
  call.queries = std::move(queries);
  return call;
}

SelectCall StepFor(uint64_t attachment, int64_t layer, uint64_t step, std::vector<float> queries) {
  SelectCall call;
  call.attachment_id = attachment;
  call.layer = layer;
  call.queries = std::move(queries);
  call.recall = true;
  call.step = step;
  return call;
}

std::vector<SelectCall> One(SelectCall call) {
  std::vector<SelectCall> calls;
  calls.push_back(std::move(call));
  return calls;
}

class ShardSelectTest : public ::testing::Test {
 protected:
  v1::AttachResponse Attach(const std::string& name, uint32_t capacity,
                            v1::HotCachePolicy policy = v1::HOT_CACHE_POLICY_TOKEN_LRU) {
    v1::AttachRequest request;
    *request.mutable_sequence() = Handle(name);
    request.mutable_hot_cache()->set_capacity_tokens(capacity);
    request.mutable_hot_cache()->set_policy(policy);
    return shard_->Attach(request).value();
  }

  const TestKv kv_ = MakeKv(TestShape(), kPrompt + 200, 1);
  ShardHarness shard_;
};

TEST_F(ShardSelectTest, AnswersZonesAndState) {
  shard_.Ready(OpenRequest("a", kv_, kPrompt), kv_);
  const SelectAnswer answer = shard_.SelectOne("a", 1, MakeQueries(kv_.shape, 2));
  ASSERT_TRUE(answer.status.ok()) << answer.status;
  EXPECT_EQ(answer.layer, 1);
  EXPECT_EQ(answer.window_begin, kPrompt);
  EXPECT_EQ(answer.record_bytes, 2 * 32 * 2);
  ASSERT_EQ(answer.heads.size(), 2u);
  for (size_t head = 0; head < 2; ++head) {
    const kernels::HeadSelection& selection = answer.heads[head];
    EXPECT_EQ(selection.positions.size(), 40u - 16u);
    EXPECT_TRUE(std::is_sorted(selection.positions.begin(), selection.positions.end()));
    EXPECT_GE(selection.positions.front(), 16);
    EXPECT_LT(selection.positions.back(), kPrompt);
    EXPECT_EQ(selection.coded_tokens, 100 - 24);
    EXPECT_EQ(selection.state_output.size(), 2u * 32u);
    EXPECT_GT(answer.estimated_tokens[head], 0);
    for (float lse : selection.state_lse) EXPECT_TRUE(std::isfinite(lse));
  }
}

TEST_F(ShardSelectTest, BatchesAnswerInOrderAndErrorsStayWithTheirItem) {
  shard_.Ready(OpenRequest("a", kv_, kPrompt), kv_);
  std::vector<SelectCall> calls;
  calls.push_back(CallFor("a", 0, MakeQueries(kv_.shape, 2)));
  calls.push_back(CallFor("gone", 0, MakeQueries(kv_.shape, 2)));
  calls.push_back(CallFor("a", 2, MakeQueries(kv_.shape, 2)));
  calls.push_back(CallFor("a", 0, {1, 2, 3}));
  std::vector<float> bad = MakeQueries(kv_.shape, 2);
  bad[37] = std::numeric_limits<float>::quiet_NaN();
  calls.push_back(CallFor("a", 0, bad));
  calls.push_back(CallFor("a", 0, MakeQueries(kv_.shape, 2)));
  calls.back().select.set_budget_tokens(0);
  calls.push_back(CallFor("a", 1, MakeQueries(kv_.shape, 3)));
  for (bool inline_ok : {false, true}) {
    const SelectBatchAnswer batch = shard_.Select(calls, {}, inline_ok);
    std::vector<v1::ErrorReason> reasons;
    for (const SelectAnswer& item : batch.items) reasons.push_back(Reason(item.status));
    EXPECT_THAT(reasons,
                ElementsAre(v1::ERROR_REASON_UNSPECIFIED, v1::SEQUENCE_NOT_FOUND,
                            v1::LAYER_OUT_OF_RANGE, v1::SHAPE_MISMATCH, v1::NON_FINITE_QUERY,
                            v1::BUDGET_ZERO, v1::ERROR_REASON_UNSPECIFIED));
    EXPECT_EQ(Metadata(batch.items[4].status, "queryHead"), "1");
    EXPECT_EQ(Metadata(batch.items[4].status, "channel"), "5");
    EXPECT_EQ(batch.items[6].layer, 1);
    EXPECT_GE(batch.queued, absl::ZeroDuration());
    EXPECT_GE(batch.worked, absl::ZeroDuration());
  }
}

TEST_F(ShardSelectTest, EmptyBatchIsAnswered) { EXPECT_THAT(shard_.Select({}).items, IsEmpty()); }

TEST_F(ShardSelectTest, WholeBudgetNamesEveryClusteredToken) {
  shard_.Ready(OpenRequest("a", kv_, kPrompt), kv_);
  SelectCall call = CallFor("a", 0, MakeQueries(kv_.shape, 2));
  call.select.set_budget_tokens(1'000'000);
  const SelectBatchAnswer batch = shard_.Select(One(std::move(call)));
  for (const auto& selection : batch.items[0].heads) {
    ASSERT_EQ(selection.positions.size(), static_cast<size_t>(kPrompt - 16));
    EXPECT_EQ(selection.coded_tokens, 0);
  }
}

TEST_F(ShardSelectTest, PromptWithinTheSinksHasNothingToChoose) {
  shard_.Ready(OpenRequest("a", kv_, 16), kv_);
  const SelectAnswer answer = shard_.SelectOne("a", 0, MakeQueries(kv_.shape, 2));
  ASSERT_TRUE(answer.status.ok()) << answer.status;
  EXPECT_EQ(answer.window_begin, 16);
  EXPECT_THAT(answer.heads[0].positions, IsEmpty());
  EXPECT_EQ(answer.heads[0].state_lse[1], -std::numeric_limits<float>::infinity());
}

TEST_F(ShardSelectTest, RecalledRecordsAreTheBytesThatWerePut) {
  shard_.Ready(OpenRequest("a", kv_, kPrompt), kv_);
  const uint64_t attachment = Attach("a", 0).attachment_id();
  const SelectBatchAnswer batch =
      shard_.Select(One(StepFor(attachment, 1, 0, MakeQueries(kv_.shape, 4))));
  const SelectAnswer& answer = batch.items[0];
  ASSERT_TRUE(answer.status.ok()) << answer.status;
  EXPECT_EQ(answer.misses, 2 * 24);
  EXPECT_EQ(answer.hits, 0);
  for (size_t head = 0; head < 2; ++head) {
    EXPECT_EQ(answer.recalls[head].positions, answer.heads[head].positions);
    for (size_t i = 0; i < answer.recalls[head].positions.size(); ++i) {
      const std::string got(reinterpret_cast<const char*>(answer.recalls[head].records[i]),
                            static_cast<size_t>(answer.record_bytes));
      EXPECT_EQ(got,
                RawRecord(kv_, 1, static_cast<int64_t>(head), answer.recalls[head].positions[i]));
    }
  }
}

TEST_F(ShardSelectTest, WhatTheWorkerHoldsIsNotSentAgain) {
  shard_.Ready(OpenRequest("a", kv_, kPrompt), kv_);
  const uint64_t attachment = Attach("a", 256).attachment_id();
  const std::vector<float> queries = MakeQueries(kv_.shape, 4);
  EXPECT_EQ(shard_.Select(One(StepFor(attachment, 0, 0, queries))).items[0].misses, 48);
  const SelectBatchAnswer again = shard_.Select(One(StepFor(attachment, 0, 1, queries)));
  EXPECT_EQ(again.items[0].misses, 0);
  EXPECT_EQ(again.items[0].hits, 48);
  // Layers have residencies of their own.
  EXPECT_EQ(shard_.Select(One(StepFor(attachment, 1, 0, queries))).items[0].misses, 48);
}

TEST_F(ShardSelectTest, StaleStepsAreRefusedWithTheStepExpected) {
  shard_.Ready(OpenRequest("a", kv_, kPrompt), kv_);
  const uint64_t attachment = Attach("a", 256).attachment_id();
  const std::vector<float> queries = MakeQueries(kv_.shape, 4);
  shard_.Select(One(StepFor(attachment, 0, 0, queries)));
  for (uint64_t step : {0, 2}) {
    const SelectBatchAnswer stale = shard_.Select(One(StepFor(attachment, 0, step, queries)));
    EXPECT_EQ(Reason(stale.items[0].status), v1::RESIDENCY_STALE);
    EXPECT_EQ(Metadata(stale.items[0].status, "expectedStep"), "1");
  }
  SelectCall reset = StepFor(attachment, 0, 7, queries);
  reset.reset_residency = true;
  EXPECT_EQ(shard_.Select(One(std::move(reset))).items[0].misses, 48);
  EXPECT_EQ(shard_.Select(One(StepFor(attachment, 0, 8, queries))).items[0].hits, 48);
}

TEST_F(ShardSelectTest, StepsOfOneBatchRunInOrder) {
  shard_.Ready(OpenRequest("a", kv_, kPrompt), kv_);
  const uint64_t attachment = Attach("a", 256).attachment_id();
  std::vector<SelectCall> calls;
  for (uint64_t step = 0; step < 20; ++step) {
    calls.push_back(StepFor(attachment, 0, step, MakeQueries(kv_.shape, step % 5)));
  }
  const SelectBatchAnswer batch = shard_.Select(std::move(calls));
  for (const SelectAnswer& item : batch.items) EXPECT_TRUE(item.status.ok()) << item.status;
}

TEST_F(ShardSelectTest, AttachChecksLayoutAndState) {
  shard_->OpenSequence(OpenRequest("a", kv_, kPrompt)).value();
  v1::AttachRequest request;
  *request.mutable_sequence() = Handle("a");
  EXPECT_EQ(Reason(shard_->Attach(request).status()), v1::SEQUENCE_NOT_READY);
  ASSERT_TRUE(shard_.Put("a", kv_, kPrompt).ok());
  ASSERT_TRUE(shard_.Seal("a").ok());
  *request.mutable_shape() = kv_.shape;
  EXPECT_TRUE(shard_->Attach(request).ok());
  request.mutable_shape()->set_head_dim(64);
  EXPECT_EQ(Reason(shard_->Attach(request).status()), v1::SHAPE_MISMATCH);
  *request.mutable_shape() = kv_.shape;
  request.mutable_shape()->set_element_type(v1::ELEMENT_TYPE_FLOAT16);
  EXPECT_EQ(Reason(shard_->Attach(request).status()), v1::DTYPE_MISMATCH);
  request.clear_shape();
  request.set_codec("k8v4");
  EXPECT_EQ(Reason(shard_->Attach(request).status()), v1::INVALID_FIELD);
  request.clear_codec();
  request.mutable_hot_cache()->set_capacity_tokens(1 << 24);
  EXPECT_EQ(Reason(shard_->Attach(request).status()), v1::INVALID_FIELD);
  request.clear_hot_cache();
  request.set_session_id(12);
  EXPECT_EQ(Reason(shard_->Attach(request).status()), v1::SESSION_NOT_FOUND);
}

TEST_F(ShardSelectTest, AttachAnswersGrpcAndTheMostExactTokens) {
  shard_.Ready(OpenRequest("a", kv_, kPrompt), kv_);
  v1::AttachRequest request;
  *request.mutable_sequence() = Handle("a");
  request.add_links(v1::LINK_NCCL);
  request.mutable_select()->set_budget_tokens(50);
  v1::AttachResponse response = shard_->Attach(request).value();
  EXPECT_EQ(response.link(), v1::LINK_GRPC);
  EXPECT_NE(response.link_reason(), "");
  EXPECT_EQ(response.max_exact_tokens(), 50u - 16u);
  EXPECT_EQ(response.sequence().select().budget_tokens(), 50u);
  EXPECT_EQ(response.sequence().attachments(), 1u);
  request.mutable_select()->set_budget_tokens(1'000'000);
  EXPECT_EQ(shard_->Attach(request).value().max_exact_tokens(), kPrompt - 16u);

  v1::OpenSequenceRequest published = OpenRequest("p", kv_, kPrompt);
  published.set_preset("clusterkv");
  published.mutable_select()->Clear();
  published.mutable_select()->set_budget_tokens(64);
  shard_.Ready(published, kv_);
  *request.mutable_sequence() = Handle("p");
  request.clear_select();
  EXPECT_EQ(shard_->Attach(request).value().max_exact_tokens(), 2u * 48u) << "the group's union";
}

TEST_F(ShardSelectTest, DetachedAttachmentsAreGone) {
  shard_.Ready(OpenRequest("a", kv_, kPrompt), kv_);
  const uint64_t attachment = Attach("a", 16).attachment_id();
  EXPECT_TRUE(shard_->Detach(attachment).ok());
  EXPECT_EQ(Reason(shard_->Detach(attachment)), v1::ATTACHMENT_NOT_FOUND);
  const SelectBatchAnswer batch =
      shard_.Select(One(StepFor(attachment, 0, 0, MakeQueries(kv_.shape, 4))));
  EXPECT_EQ(Reason(batch.items[0].status), v1::ATTACHMENT_NOT_FOUND);
}

TEST_F(ShardSelectTest, ClusterGranularCachesKeepWholeClusters) {
  shard_.Ready(OpenRequest("a", kv_, kPrompt), kv_);
  const uint64_t attachment = Attach("a", 256, v1::HOT_CACHE_POLICY_CLUSTER_LRU).attachment_id();
  const std::vector<float> queries = MakeQueries(kv_.shape, 4);
  const SelectBatchAnswer first = shard_.Select(One(StepFor(attachment, 0, 0, queries)));
  EXPECT_TRUE(first.items[0].cluster_granular);
  EXPECT_EQ(shard_.Select(One(StepFor(attachment, 0, 1, queries))).items[0].misses, 0);
}

TEST_F(ShardSelectTest, RecallByNameSendsTokensAndClusters) {
  shard_.Ready(OpenRequest("a", kv_, kPrompt), kv_);
  v1::GetIndexRequest index_request;
  *index_request.mutable_sequence() = Handle("a");
  index_request.set_want_positions(true);
  index_request.set_want_centroids(true);
  const std::vector<v1::IndexChunk> index = shard_->GetIndex(index_request).value();
  ASSERT_EQ(index.size(), 2u) << "one part, two heads";
  ASSERT_GT(index[1].sizes(0), 0u);

  v1::RecallClustersRequest request;
  *request.mutable_sequence() = Handle("a");
  auto* head = request.add_heads();
  head->set_kv_head(1);
  head->add_positions(699);
  head->add_positions(16);
  head->add_clusters(0);
  const Shard::RecallAnswer answer = shard_->Recall(request).value();
  ASSERT_EQ(answer.heads.size(), 1u);
  std::vector<int32_t> expected = {699, 16};
  for (uint32_t i = 0; i < index[1].sizes(0); ++i) {
    expected.push_back(static_cast<int32_t>(index[1].positions(static_cast<int>(i))));
  }
  EXPECT_EQ(answer.heads[0].positions, expected);
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(std::string(reinterpret_cast<const char*>(answer.heads[0].records[i]),
                          static_cast<size_t>(answer.record_bytes)),
              RawRecord(kv_, 0, 1, expected[i]));
  }
}

// Numbers of an IndexChunk's vector.
std::vector<float> Floats(const v1::Vector& vector) {
  EXPECT_EQ(vector.type(), v1::ELEMENT_TYPE_FLOAT32);
  std::vector<float> floats(vector.data().size() / sizeof(float));
  std::memcpy(floats.data(), vector.data().data(), floats.size() * sizeof(float));
  return floats;
}

TEST_F(ShardSelectTest, TheIndexShowsMeansAsTheNearestHalves) {
  shard_.Ready(OpenRequest("a", kv_, kPrompt), kv_);
  v1::GetIndexRequest request;
  *request.mutable_sequence() = Handle("a");
  request.set_want_positions(true);
  request.set_want_centroids(true);
  request.set_want_value_means(true);
  const std::vector<v1::IndexChunk> index = shard_->GetIndex(request).value();
  ASSERT_EQ(index.size(), 2u) << "one part, two heads";
  const int64_t dim = kv_.shape.head_dim();
  for (const v1::IndexChunk& chunk : index) {
    const std::vector<float> weights = Floats(chunk.metric_weights());
    const std::vector<float> centroids = Floats(chunk.centroids());
    const std::vector<float> means = Floats(chunk.value_means());
    ASSERT_EQ(weights.size(), static_cast<size_t>(dim));
    ASSERT_EQ(centroids.size(), static_cast<size_t>(chunk.sizes_size() * dim));
    ASSERT_EQ(means.size(), centroids.size());
    int slot = 0;
    for (int c = 0; c < chunk.sizes_size(); ++c) {
      std::vector<double> sums(2 * dim, 0.0);
      for (uint32_t i = 0; i < chunk.sizes(c); ++i) {
        const std::string record = RawRecord(kv_, 0, chunk.kv_head(), chunk.positions(slot++));
        std::vector<float> row(2 * dim);
        kernels::ToFloat(reinterpret_cast<const std::byte*>(record.data()),
                         kernels::ElementType::kBFloat16, 2 * dim, row.data());
        for (int64_t j = 0; j < 2 * dim; ++j) sums[j] += j < dim ? row[j] * weights[j] : row[j];
      }
      for (int64_t j = 0; chunk.sizes(c) > 0 && j < 2 * dim; ++j) {
        const float mean = static_cast<float>(sums[j] / chunk.sizes(c));
        ASSERT_EQ(j < dim ? centroids[c * dim + j] : means[c * dim + j - dim],
                  kernels::HalfToFloat(kernels::FloatToHalfSaturated(mean)))
            << c << " " << j;
      }
    }
  }
}

TEST_F(ShardSelectTest, RecallRefusesWhatIsNotClustered) {
  shard_.Ready(OpenRequest("a", kv_, kPrompt), kv_);
  const auto recall = [&](uint32_t head, std::vector<uint32_t> positions,
                          std::vector<uint32_t> clusters) {
    v1::RecallClustersRequest request;
    *request.mutable_sequence() = Handle("a");
    auto* asked = request.add_heads();
    asked->set_kv_head(head);
    for (uint32_t position : positions) asked->add_positions(position);
    for (uint32_t cluster : clusters) asked->add_clusters(cluster);
    return Reason(shard_->Recall(request).status());
  };
  EXPECT_EQ(recall(2, {}, {}), v1::INVALID_FIELD);
  EXPECT_EQ(recall(0, {15}, {}), v1::TOKENS_OUT_OF_RANGE);
  EXPECT_EQ(recall(0, {kPrompt}, {}), v1::TOKENS_OUT_OF_RANGE);
  EXPECT_EQ(recall(0, {4'000'000'000u}, {}), v1::TOKENS_OUT_OF_RANGE);
  EXPECT_EQ(recall(0, {}, {1000}), v1::INVALID_FIELD);
  EXPECT_EQ(recall(0, std::vector<uint32_t>(2 * kPrompt, 16), {}), v1::LIMIT_EXCEEDED);
  EXPECT_EQ(recall(0, {}, {}), v1::ERROR_REASON_UNSPECIFIED);
}

TEST_F(ShardSelectTest, ChangedPagesAreNeverSentWhenRecallsAreVerified) {
  ShardOptions options = TestOptions();
  options.verify_recalls = true;
  ShardHarness shard(options);
  shard.Ready(OpenRequest("a", kv_, kPrompt), kv_);
  v1::RecallClustersRequest request;
  *request.mutable_sequence() = Handle("a");
  auto* head = request.add_heads();
  head->add_positions(100);
  std::byte* record = nullptr;
  {
    const Shard::RecallAnswer answer = shard->Recall(request).value();
    record = const_cast<std::byte*>(answer.heads[0].records[0]);
  }
  *record ^= std::byte{4};
  EXPECT_EQ(Reason(shard->Recall(request).status()), v1::CHECKSUM_MISMATCH);
  EXPECT_FALSE(shard->VerifyLedger(true).balanced());
  *record ^= std::byte{4};
  EXPECT_TRUE(shard->Recall(request).ok());
}

TEST_F(ShardSelectTest, PinnedPagesAreRecalling) {
  shard_.Ready(OpenRequest("a", kv_, kPrompt), kv_);
  v1::RecallClustersRequest request;
  *request.mutable_sequence() = Handle("a");
  request.add_heads()->add_positions(100);
  {
    const Shard::RecallAnswer answer = shard_->Recall(request).value();
    EXPECT_GT(shard_->GetStats().pages().recalling(), 0u);
    EXPECT_TRUE(shard_->Release(Handle("a")).ok());
    EXPECT_EQ(std::string(reinterpret_cast<const char*>(answer.heads[0].records[0]),
                          static_cast<size_t>(answer.record_bytes)),
              RawRecord(kv_, 0, 0, 100))
        << "a released sequence's pages stay while they are read";
  }
  EXPECT_EQ(shard_->GetStats().pages().free(), shard_->GetStats().pages().total());
}

// --- corrections

// That of one head, recomputed from the tokens as they came.
kernels::Correction ExpectedCorrection(const TestKv& kv, int64_t layer, int64_t head,
                                       const kernels::HeadSelection& selection,
                                       const std::vector<float>& queries) {
  const kernels::RecordCodec& codec = *kernels::FindRecordCodec("k8v4");
  const auto type = static_cast<kernels::ElementType>(kv.shape.element_type());
  const int64_t dim = kv.shape.head_dim(), head_bytes = dim * kernels::ElementBytes(type);
  const int64_t group = kv.shape.query_heads() / kv.shape.kv_heads();
  const size_t record_bytes = static_cast<size_t>(codec.RecordBytes(type, dim));
  const size_t remainder_bytes = static_cast<size_t>(codec.RemainderBytes(type, dim));
  const size_t count = selection.positions.size();
  std::vector<std::byte> records(count * record_bytes), remainders(count * remainder_bytes);
  std::vector<const std::byte*> at_record, at_remainder;
  for (size_t i = 0; i < count; ++i) {
    const KvChunkView token = kv.Chunk(layer, selection.positions[i], 1);
    const auto* key = reinterpret_cast<const std::byte*>(token.keys.data()) + head * head_bytes;
    const auto* value = reinterpret_cast<const std::byte*>(token.values.data()) + head * head_bytes;
    at_record.push_back(&records[i * record_bytes]);
    at_remainder.push_back(&remainders[i * remainder_bytes]);
    codec.Encode(key, 0, value, 0, type, dim, 1, &records[i * record_bytes]);
    codec.EncodeRemainders(value, 0, type, dim, 1, at_record[i], &remainders[i * remainder_bytes]);
  }
  const kernels::AttentionParams params = {group, dim, type,
                                           1.0f / std::sqrt(static_cast<float>(dim))};
  kernels::Correction correction;
  const absl::Status status = kernels::ComputeCorrectionReference(
      params,
      absl::MakeConstSpan(queries).subspan(static_cast<size_t>(head * group * dim),
                                           static_cast<size_t>(group * dim)),
      {&codec, at_record, at_remainder, selection.head_masks}, &correction);
  EXPECT_TRUE(status.ok()) << status;
  return correction;
}

void ExpectCorrections(const TestKv& kv, const SelectAnswer& answer,
                       const std::vector<float>& queries) {
  ASSERT_TRUE(answer.status.ok()) << answer.status;
  ASSERT_EQ(answer.corrections.size(), answer.heads.size());
  for (size_t head = 0; head < answer.heads.size(); ++head) {
    EXPECT_FALSE(answer.heads[head].positions.empty());
    const kernels::Correction& got = answer.corrections[head];
    const kernels::Correction expected = ExpectedCorrection(
        kv, answer.layer, static_cast<int64_t>(head), answer.heads[head], queries);
    ASSERT_EQ(got.codes.size(), expected.codes.size());
    ASSERT_EQ(got.log_scales.size(), expected.log_scales.size());
    for (size_t g = 0; g < got.log_scales.size(); ++g) {
      EXPECT_FALSE(!(std::abs(got.log_scales[g] - expected.log_scales[g]) <= 1e-4f)) << g;
    }
    for (size_t i = 0; i < got.codes.size(); ++i) {
      ASSERT_LE(std::abs(got.codes[i] - expected.codes[i]), 1) << i;
    }
  }
}

TEST(ShardCorrectionTest, EveryPresetAnswersWhatItsExactRecordsLack) {
  const TestKv kv = MakeKv(TestShape(), kPrompt + 48, 6);
  for (const char* preset : {"clusterkv", "recall", "default"}) {
    SCOPED_TRACE(preset);
    ShardHarness shard;
    v1::OpenSequenceRequest request = OpenRequest("a", kv, kPrompt);
    request.set_preset(preset);
    if (preset == std::string("clusterkv")) request.clear_select();
    request.mutable_select()->set_budget_tokens(64);
    request.set_codec("k8v4");
    request.set_max_decode_tokens(48);
    request.mutable_index()->set_window_tokens(24);
    shard.Ready(request, kv);
    for (uint64_t seed : {1, 2, 3}) {
      const std::vector<float> queries = MakeQueries(kv.shape, seed);
      ExpectCorrections(kv, shard.SelectOne("a", 1, queries), queries);
    }
    // All tokens exact: those of clustered windows and of a fork's shared parts, too.
    ASSERT_TRUE(shard->Append(AppendRequest("a", kv, kPrompt, 48)).ok());
    v1::ForkSequenceRequest fork;
    *fork.mutable_source() = Handle("a");
    fork.set_name("fork");
    shard.WaitIdle();
    ASSERT_TRUE(shard->Fork(fork).ok());
    ASSERT_TRUE(shard->Release(Handle("a")).ok());
    const std::vector<float> queries = MakeQueries(kv.shape, 4);
    SelectCall call = CallFor("fork", 0, queries);
    call.select.set_budget_tokens(1 << 20);
    const SelectBatchAnswer batch = shard.Select(One(std::move(call)));
    ExpectCorrections(kv, batch.items[0], queries);
    EXPECT_EQ(batch.items[0].heads[0].positions.back(), kPrompt + 47);
  }
}

TEST(ShardCorrectionTest, APromptOfSinksHasNothingToCorrect) {
  const TestKv kv = MakeKv(TestShape(), kPrompt, 6);
  ShardHarness shard;
  v1::OpenSequenceRequest request = OpenRequest("a", kv, 10);
  request.set_codec("k8v4");
  shard.Ready(request, kv);
  const SelectAnswer answer = shard.SelectOne("a", 0, MakeQueries(kv.shape, 1));
  ASSERT_TRUE(answer.status.ok()) << answer.status;
  for (const kernels::Correction& head : answer.corrections) {
    for (const float scale : head.log_scales) {
      EXPECT_EQ(scale, -std::numeric_limits<float>::infinity());
    }
  }
  EXPECT_EQ(answer.corrections.size(), 2u);
}

TEST(ShardCorrectionTest, LosslessCodecsHaveNone) {
  const TestKv kv = MakeKv(TestShape(), kPrompt, 6);
  ShardHarness shard;
  shard.Ready(OpenRequest("a", kv, kPrompt), kv);
  EXPECT_TRUE(shard.SelectOne("a", 0, MakeQueries(kv.shape, 1)).corrections.empty());
  const uint64_t state_bytes = shard->GetStats().state_bytes();
  v1::OpenSequenceRequest request = OpenRequest("b", kv, kPrompt);
  request.set_codec("k8v4");
  shard.Ready(request, kv);
  EXPECT_FALSE(shard.SelectOne("b", 0, MakeQueries(kv.shape, 1)).corrections.empty());
  EXPECT_EQ(shard->GetStats().state_bytes(), 2 * state_bytes + 4u * (32u + 4u));
}

// --- the same answers whatever the codec, the threads and the run

struct Digests {
  std::vector<uint64_t> index;
  uint64_t selection = 0, state = 0;
  uint64_t correction = 0;  // 0: there was none
  bool operator==(const Digests&) const = default;
};

Digests Replay(const TestKv& kv, const std::string& preset, const std::string& codec, int threads,
               bool inline_ok) {
  ShardOptions options = TestOptions();
  options.build_threads = options.select_threads = threads;
  ShardHarness shard(options);
  v1::OpenSequenceRequest request = OpenRequest("a", kv, kPrompt);
  request.set_preset(preset);
  request.set_codec(codec);
  if (preset == "clusterkv") request.clear_select();
  Digests digests;
  const v1::Sequence ready = shard.Ready(request, kv);
  for (const v1::LayerInfo& layer : ready.layers()) {
    digests.index.push_back(layer.index_digest());
  }
  std::string selection, state, correction;
  for (uint64_t step = 0; step < 12; ++step) {
    std::vector<SelectCall> calls;
    for (int64_t layer = 0; layer < kv.shape.layers(); ++layer) {
      calls.push_back(CallFor("a", layer, MakeQueries(kv.shape, 100 + step)));
    }
    const SelectBatchAnswer batch = shard.Select(std::move(calls), {}, inline_ok);
    const auto append = [](std::string& bytes, const auto& values) {
      bytes.append(reinterpret_cast<const char*>(values.data()),
                   values.size() * sizeof(values.front()));
    };
    for (const SelectAnswer& item : batch.items) {
      EXPECT_TRUE(item.status.ok()) << item.status;
      for (const kernels::HeadSelection& head : item.heads) {
        append(selection, head.positions);
        append(selection, head.head_masks);
        append(state, head.state_output);
        append(state, head.state_lse);
      }
      for (const kernels::Correction& head : item.corrections) {
        append(correction, head.codes);
        append(correction, head.log_scales);
      }
    }
  }
  digests.selection = XXH3_64bits(selection.data(), selection.size());
  digests.state = XXH3_64bits(state.data(), state.size());
  if (!correction.empty()) {
    digests.correction = XXH3_64bits(correction.data(), correction.size());
  }
  return digests;
}

TEST(ShardDeterminismTest, AnswersAreTheSameForEveryCodecThreadCountAndRun) {
  const TestKv kv = MakeKv(TestShape(), kPrompt, 5);
  for (const char* preset : {"clusterkv", "recall", "default"}) {
    const Digests expected = Replay(kv, preset, "raw", 1, false);
    EXPECT_EQ(Replay(kv, preset, "raw", 1, true), expected) << preset;
    EXPECT_EQ(Replay(kv, preset, "raw", 2, false), expected) << preset;
    EXPECT_EQ(Replay(kv, preset, "raw", 5, true), expected) << preset;
    const Digests coarse = Replay(kv, preset, "k8v4", 2, false);
    EXPECT_EQ(Replay(kv, preset, "k8v4", 1, true), coarse) << preset;
    EXPECT_NE(coarse.correction, 0u);
    Digests without_correction = coarse;
    without_correction.correction = 0;
    EXPECT_EQ(without_correction, expected) << preset;
  }
}

}  // namespace
}  // namespace clusterkv::cache_service
