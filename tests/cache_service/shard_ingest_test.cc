// How a prompt comes in: any order, duplicates, conflicts, gaps, statistics, memory.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <xxhash.h>

#include <algorithm>
#include <limits>
#include <random>
#include <thread>

#include "absl/synchronization/notification.h"
#include "kernels/base/element_type.h"
#include "tests/cache_service/shard_harness.h"
#include "tests/test_seed.h"

namespace clusterkv::cache_service {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr int64_t kPrompt = 331;  // a prime

std::vector<uint64_t> IndexDigests(const v1::Sequence& sequence) {
  std::vector<uint64_t> digests;
  for (const v1::LayerInfo& layer : sequence.layers()) digests.push_back(layer.index_digest());
  return digests;
}

// XXH3 of keys then values, from a copy.
uint64_t Checksum(const KvChunkView& chunk) {
  const std::string both = std::string(chunk.keys) + std::string(chunk.values);
  return XXH3_64bits(both.data(), both.size());
}

class ShardIngestTest : public ::testing::Test {
 protected:
  absl::Status Put(const KvChunkView& chunk) { return shard_->PutChunk(Handle("a"), chunk); }
  void Open(const TestKv& kv, int64_t prompt = kPrompt) {
    const auto opened = shard_->OpenSequence(OpenRequest("a", kv, prompt));
    ASSERT_TRUE(opened.ok()) << opened.status();
    EXPECT_EQ(opened->state(), v1::SEQUENCE_STATE_OPEN);
  }

  const TestKv kv_ = MakeKv(TestShape(), kPrompt, 1);
  ShardHarness shard_;
};

TEST_F(ShardIngestTest, SequenceGoesThroughItsStates) {
  Open(kv_);
  const auto state = [&] { return shard_->GetSequence(Handle("a")).value().state(); };
  ASSERT_TRUE(Put(kv_.Chunk(0, 0, 10)).ok());
  EXPECT_EQ(state(), v1::SEQUENCE_STATE_FILLING);
  EXPECT_THAT(shard_->CompleteLayers(Handle("a")), IsEmpty());
  ASSERT_TRUE(Put(kv_.Chunk(0, 10, kPrompt - 10)).ok());
  EXPECT_THAT(shard_->CompleteLayers(Handle("a")), ElementsAre(0u));
  EXPECT_EQ(state(), v1::SEQUENCE_STATE_FILLING);
  ASSERT_TRUE(Put(kv_.Chunk(1, 0, kPrompt)).ok());
  EXPECT_THAT(shard_->CompleteLayers(Handle("a")), ElementsAre(0u, 1u));
  EXPECT_EQ(state(), v1::SEQUENCE_STATE_CLUSTERING) << "not sealed yet";
  const v1::Sequence sealed = shard_.Seal("a").value();
  EXPECT_EQ(sealed.state(), v1::SEQUENCE_STATE_READY);
  EXPECT_EQ(sealed.tokens(), kPrompt);
  ASSERT_EQ(sealed.layers_size(), 2);
  EXPECT_EQ(sealed.layers(1).state(), v1::LAYER_STATE_READY);
  EXPECT_EQ(sealed.layers(1).window_begin(), kPrompt);
  EXPECT_EQ(sealed.layers(1).clusters(), (256u / 16u) + ((kPrompt - 16u - 256u) / 16u));
  EXPECT_NE(sealed.layers(1).index_digest(), 0u);
  EXPECT_TRUE(shard_.Seal("a").ok()) << "idempotent";
}

TEST_F(ShardIngestTest, OneLayerIsAnsweredWhileTheNextIsStillMissing) {
  Open(kv_);
  ASSERT_TRUE(Put(kv_.Chunk(0, 0, kPrompt)).ok());
  EXPECT_TRUE(shard_.SelectOne("a", 0, MakeQueries(kv_.shape, 1)).status.ok());
  const absl::Status missing = shard_.SelectOne("a", 1, MakeQueries(kv_.shape, 1)).status;
  EXPECT_EQ(Reason(missing), v1::LAYER_NOT_READY);
  EXPECT_EQ(Metadata(missing, "missing"), "[0, 331)");
}

TEST_F(ShardIngestTest, AnyOrderWithDuplicatesBuildsTheSameIndex) {
  const std::vector<uint64_t> expected =
      IndexDigests(shard_.Ready(OpenRequest("in order", kv_, kPrompt), kv_));
  std::mt19937_64 random(TestSeed(20240607));
  for (int round = 0; round < 20; ++round) {
    Open(kv_);
    std::vector<KvChunkView> chunks;
    for (int64_t layer = 0; layer < 2; ++layer) {
      ASSERT_TRUE(shard_->PutStatistics(Handle("a"), layer, kv_.layers[layer].query_rms).ok());
      for (int64_t at = 0; at < kPrompt;) {
        const int64_t tokens =
            std::min<int64_t>(1 + static_cast<int64_t>(random() % 90), kPrompt - at);
        chunks.push_back(kv_.Chunk(layer, at, tokens));
        at += tokens;
      }
      for (int extra = 0; extra < 6; ++extra) {  // overlap whatever is there
        const int64_t at = static_cast<int64_t>(random() % kPrompt);
        chunks.push_back(kv_.Chunk(
            layer, at, 1 + static_cast<int64_t>(random() % static_cast<uint64_t>(kPrompt - at))));
      }
    }
    std::shuffle(chunks.begin(), chunks.end(), random);
    for (KvChunkView& chunk : chunks) {
      if (random() % 2 == 0) chunk.checksum = Checksum(chunk);
      ASSERT_TRUE(Put(chunk).ok());
    }
    EXPECT_EQ(IndexDigests(shard_.Seal("a").value()), expected) << "round " << round;
    ASSERT_TRUE(shard_->Release(Handle("a")).ok());
  }
}

TEST_F(ShardIngestTest, RecordsAndRowsAreThoseThatWerePut) {
  Open(kv_);
  ASSERT_TRUE(shard_.Put("a", kv_, kPrompt, 7).ok());
  ASSERT_TRUE(shard_.Seal("a").ok());
  const Shard::SteadyZone zone = shard_->GetSteadyZone(Handle("a"), 1).value();
  ASSERT_EQ(zone.positions.size(), 16u);
  const size_t head_bytes = 32 * 2;
  for (size_t i = 0; i < 16; ++i) {
    EXPECT_EQ(zone.positions[i], static_cast<int32_t>(i));
    for (size_t head = 0; head < 2; ++head) {
      const size_t at = i * 2 * head_bytes + head * head_bytes;
      EXPECT_EQ(
          zone.heads[head].substr(i * 2 * head_bytes, 2 * head_bytes),
          kv_.layers[1].keys.substr(at, head_bytes) + kv_.layers[1].values.substr(at, head_bytes));
    }
  }
}

TEST_F(ShardIngestTest, ConflictsAreRefusedAndNothingElseIsLost) {
  const std::vector<uint64_t> expected =
      IndexDigests(shard_.Ready(OpenRequest("clean", kv_, kPrompt), kv_));
  TestKv other = kv_;
  other.layers[0].values[static_cast<size_t>(20 * kv_.row_bytes() + 5)] ^= 1;
  Open(kv_);
  ASSERT_TRUE(Put(kv_.Chunk(0, 10, 20)).ok());
  // Token 20 conflicts; tokens 30 and later of the same chunk must not be written.
  const absl::Status conflict = Put(other.Chunk(0, 15, 100));
  EXPECT_EQ(Reason(conflict), v1::CHUNK_CONFLICT);
  EXPECT_EQ(Metadata(conflict, "token"), "20");
  EXPECT_EQ(Metadata(shard_.Seal("a").status(), "missing"),
            "layer 0: [0, 10) [30, 331); layer 1: [0, 331)");
  ASSERT_TRUE(shard_.Put("a", kv_, kPrompt).ok());
  EXPECT_EQ(IndexDigests(shard_.Seal("a").value()), expected);
}

TEST_F(ShardIngestTest, DuplicatesAndConflictsAreToldApartOnceClustered) {
  TestKv other = kv_;
  for (int64_t token : {3, 200}) {
    other.layers[0].keys[static_cast<size_t>(token * kv_.row_bytes())] ^= 1;
  }
  for (const char* codec : {"raw", "k8v4"}) {
    v1::OpenSequenceRequest request = OpenRequest("a", kv_, kPrompt);
    request.set_codec(codec);
    shard_.Ready(request, kv_);  // in chunks of 64
    EXPECT_TRUE(Put(kv_.Chunk(0, 192, 64)).ok()) << "the same range, the same bytes";
    EXPECT_EQ(Reason(Put(other.Chunk(0, 192, 64))), v1::CHUNK_CONFLICT);
    EXPECT_TRUE(Put(kv_.Chunk(0, 2, 9)).ok()) << "sinks stay as they came";
    EXPECT_EQ(Reason(Put(other.Chunk(0, 2, 9))), v1::CHUNK_CONFLICT);
    EXPECT_EQ(Reason(Put(other.Chunk(0, 195, 11))), v1::CHUNK_CONFLICT);
    const absl::Status unlike = Put(kv_.Chunk(0, 195, 11));
    if (std::string(codec) == "raw") {
      EXPECT_TRUE(unlike.ok()) << unlike;
    } else {
      EXPECT_EQ(Reason(unlike), v1::CHUNK_CONFLICT);
      EXPECT_THAT(std::string(unlike.message()), HasSubstr("cannot be compared"));
    }
    ASSERT_TRUE(shard_->Release(Handle("a")).ok());
  }
}

TEST_F(ShardIngestTest, BadChunksAreRefusedByName) {
  Open(kv_);
  EXPECT_EQ(Reason(shard_->PutChunk(Handle("b"), kv_.Chunk(0, 0, 1))), v1::SEQUENCE_NOT_FOUND);
  KvChunkView chunk = kv_.Chunk(0, 0, 10);
  chunk.layer = 2;
  EXPECT_EQ(Reason(Put(chunk)), v1::LAYER_OUT_OF_RANGE);
  chunk.layer = -1;
  EXPECT_EQ(Reason(Put(chunk)), v1::LAYER_OUT_OF_RANGE);
  chunk = kv_.Chunk(0, 0, 10);
  chunk.first_token = kPrompt - 9;
  EXPECT_EQ(Reason(Put(chunk)), v1::TOKENS_OUT_OF_RANGE);
  chunk.first_token = std::numeric_limits<int64_t>::max();
  EXPECT_EQ(Reason(Put(chunk)), v1::TOKENS_OUT_OF_RANGE);
  chunk = kv_.Chunk(0, 0, 10);
  chunk.tokens = 0;
  EXPECT_EQ(Reason(Put(chunk)), v1::TOKENS_OUT_OF_RANGE);
  chunk.tokens = 11;
  EXPECT_EQ(Reason(Put(chunk)), v1::SHAPE_MISMATCH);
  chunk = kv_.Chunk(0, 0, 10);
  chunk.values = chunk.values.substr(1);
  EXPECT_EQ(Metadata(Put(chunk), "field"), "values");
  chunk = kv_.Chunk(0, 0, 10);
  chunk.checksum = Checksum(chunk) ^ 1;
  EXPECT_EQ(Reason(Put(chunk)), v1::CHECKSUM_MISMATCH);
  EXPECT_EQ(shard_->GetSequence(Handle("a")).value().state(), v1::SEQUENCE_STATE_OPEN);
}

TEST_F(ShardIngestTest, NonFiniteNumbersAreNamedToTheChannel) {
  for (v1::ElementType type :
       {v1::ELEMENT_TYPE_FLOAT32, v1::ELEMENT_TYPE_FLOAT16, v1::ELEMENT_TYPE_BFLOAT16}) {
    TestKv kv = MakeKv(TestShape(1, type), 40, 1);
    const int64_t element = kernels::ElementBytes(static_cast<kernels::ElementType>(type));
    // Token 33, KV head 1, channel 7.
    const int64_t at = 33 * kv.row_bytes() + (32 + 7) * element;
    kernels::StoreElement(std::numeric_limits<float>::infinity(),
                          reinterpret_cast<std::byte*>(kv.layers[0].values.data()) + at,
                          static_cast<kernels::ElementType>(type));
    Open(kv, 40);
    const absl::Status status = Put(kv.Chunk(0, 30, 10));
    EXPECT_EQ(Reason(status), v1::NON_FINITE_KEY);
    EXPECT_EQ(Metadata(status, "field"), "values");
    EXPECT_EQ(Metadata(status, "token"), "33");
    EXPECT_EQ(Metadata(status, "head"), "1");
    EXPECT_EQ(Metadata(status, "channel"), "7");
    ASSERT_TRUE(shard_->Release(Handle("a")).ok());
  }
}

TEST_F(ShardIngestTest, SealNamesTheGaps) {
  Open(kv_);
  EXPECT_EQ(Metadata(shard_.Seal("a").status(), "missing"), "layer 0: [0, 331); layer 1: [0, 331)");
  ASSERT_TRUE(Put(kv_.Chunk(0, 0, kPrompt)).ok());
  ASSERT_TRUE(Put(kv_.Chunk(1, 100, 31)).ok());
  const absl::Status status = shard_.Seal("a").status();
  EXPECT_EQ(Reason(status), v1::CHUNKS_MISSING);
  EXPECT_EQ(Metadata(status, "missing"), "layer 1: [0, 100) [131, 331)");
}

TEST_F(ShardIngestTest, StatisticsChooseTheMetric) {
  const std::vector<uint64_t> balanced =
      IndexDigests(shard_.Ready(OpenRequest("balanced", kv_, kPrompt), kv_));
  Open(kv_);
  ASSERT_TRUE(shard_.Put("a", kv_, kPrompt, 64, /*statistics=*/false).ok());
  const std::vector<uint64_t> raw = IndexDigests(shard_.Seal("a").value());
  EXPECT_NE(raw, balanced);
  v1::OpenSequenceRequest request = OpenRequest("raw", kv_, kPrompt);
  request.mutable_index()->set_metric(v1::METRIC_RAW);
  EXPECT_EQ(IndexDigests(shard_.Ready(request, kv_)), raw) << "RAW looks at no statistics";
}

TEST_F(ShardIngestTest, StatisticsAreChecked) {
  Open(kv_);
  const auto put = [&](int64_t layer, const std::vector<float>& query_rms) {
    return Reason(shard_->PutStatistics(Handle("a"), layer, query_rms));
  };
  std::vector<float> rms = kv_.layers[0].query_rms;
  EXPECT_EQ(put(2, rms), v1::LAYER_OUT_OF_RANGE);
  EXPECT_EQ(put(0, {1, 2}), v1::SHAPE_MISMATCH);
  rms[3] = -1;
  EXPECT_EQ(put(0, rms), v1::INVALID_FIELD);
  rms[3] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(put(0, rms), v1::INVALID_FIELD);
  EXPECT_EQ(put(0, kv_.layers[0].query_rms), v1::ERROR_REASON_UNSPECIFIED);
  EXPECT_EQ(put(0, kv_.layers[0].query_rms), v1::ERROR_REASON_UNSPECIFIED) << "a duplicate";
  EXPECT_EQ(put(0, kv_.layers[1].query_rms), v1::CHUNK_CONFLICT);
  ASSERT_TRUE(Put(kv_.Chunk(1, 0, kPrompt)).ok());
  EXPECT_EQ(put(1, kv_.layers[1].query_rms), v1::CHUNK_CONFLICT) << "too late";
}

TEST_F(ShardIngestTest, BalancedByNameNeedsStatisticsBeforeTheLastChunk) {
  v1::OpenSequenceRequest request = OpenRequest("a", kv_, kPrompt);
  request.mutable_index()->set_metric(v1::METRIC_BALANCED);
  ASSERT_TRUE(shard_->OpenSequence(request).ok());
  ASSERT_TRUE(Put(kv_.Chunk(0, 0, 330)).ok());
  const absl::Status status = Put(kv_.Chunk(0, 330, 1));
  EXPECT_EQ(Reason(status), v1::INVALID_FIELD);
  EXPECT_EQ(Metadata(status, "field"), "statistics.query_rms");
  ASSERT_TRUE(shard_.Put("a", kv_, kPrompt).ok()) << "nothing was lost";
  EXPECT_TRUE(shard_.Seal("a").ok());
}

TEST_F(ShardIngestTest, SmallPromptsHaveNoPartOrATinyOne) {
  for (int64_t prompt : {1, 15, 16, 17, 18, 33}) {
    const v1::Sequence sequence = shard_.Ready(OpenRequest("a", kv_, prompt), kv_);
    EXPECT_EQ(sequence.state(), v1::SEQUENCE_STATE_READY) << prompt;
    EXPECT_EQ(sequence.layers(0).clusters() > 0, prompt > 16) << prompt;
    EXPECT_TRUE(shard_.SelectOne("a", 0, MakeQueries(kv_.shape, 1)).status.ok()) << prompt;
    ASSERT_TRUE(shard_->Release(Handle("a")).ok());
  }
}

TEST_F(ShardIngestTest, ManySinksLieInSeveralPages) {
  v1::OpenSequenceRequest request = OpenRequest("a", kv_, kPrompt);
  request.mutable_index()->set_sink_tokens(100);  // 32 rows in a page
  request.mutable_select()->set_budget_tokens(120);
  shard_.Ready(request, kv_);
  EXPECT_EQ(shard_->GetSteadyZone(Handle("a"), 0).value().positions.size(), 100u);
  const SelectAnswer answer = shard_.SelectOne("a", 0, MakeQueries(kv_.shape, 1));
  ASSERT_TRUE(answer.status.ok()) << answer.status;
  EXPECT_EQ(answer.heads[0].positions.size(), 20u);
}

TEST_F(ShardIngestTest, ConcurrentChunksOfEveryLayerMeet) {
  const TestKv kv = MakeKv(TestShape(4), 900, 3);
  const std::vector<uint64_t> expected =
      IndexDigests(shard_.Ready(OpenRequest("in order", kv, 900), kv));
  v1::OpenSequenceRequest request = OpenRequest("a", kv, 900);
  ASSERT_TRUE(shard_->OpenSequence(request).ok());
  for (int64_t layer = 0; layer < 4; ++layer) {
    ASSERT_TRUE(shard_->PutStatistics(Handle("a"), layer, kv.layers[layer].query_rms).ok());
  }
  std::vector<std::thread> writers;
  for (uint64_t writer = 0; writer < 4; ++writer) {
    writers.emplace_back([&, writer] {
      std::mt19937_64 random(writer);
      for (int64_t at = 0; at < 900; at += 50) {
        for (int64_t layer = 0; layer < 4; ++layer) {
          // Everybody puts everything, each shifted by something else.
          const int64_t first = (at + static_cast<int64_t>(writer) * 213) % 900;
          const int64_t tokens =
              std::min<int64_t>(50 + static_cast<int64_t>(random() % 40), 900 - first);
          EXPECT_TRUE(Put(kv.Chunk(layer, first, tokens)).ok());
        }
      }
    });
  }
  for (std::thread& writer : writers) writer.join();
  ASSERT_TRUE(shard_.Put("a", kv, 900).ok());
  EXPECT_EQ(IndexDigests(shard_.Seal("a").value()), expected);
}

// --- Seal's waiting

TEST_F(ShardIngestTest, SealHonoursDeadlineAndCancellation) {
  shard_.Ready(OpenRequest("a", kv_, kPrompt), kv_);
  CallContext late;
  late.deadline = absl::Now() - absl::Seconds(1);
  EXPECT_EQ(Reason(shard_.Seal("a", late).status()), v1::QUEUE_DEADLINE);
  CallContext cancelled;
  cancelled.is_cancelled = [] { return true; };
  EXPECT_EQ(Reason(shard_.Seal("a", cancelled).status()), v1::CANCELLED_BY_CLIENT);
}

TEST_F(ShardIngestTest, SealEndsWhenTheSequenceIsReleased) {
  // Enough work that the release comes first, and right if it does not.
  const TestKv kv = MakeKv(TestShape(2), 6000, 3);
  v1::OpenSequenceRequest request = OpenRequest("a", kv, 6000);
  request.mutable_index()->set_segment_tokens(0);
  request.mutable_index()->set_iterations(30);
  ASSERT_TRUE(shard_->OpenSequence(request).ok());
  ASSERT_TRUE(shard_.Put("a", kv, 6000, 1000).ok());
  absl::Notification answered;
  absl::StatusOr<v1::Sequence> answer;
  shard_->Seal(Handle("a"), CallContext(), [&](absl::StatusOr<v1::Sequence> sequence) {
    answer = std::move(sequence);
    answered.Notify();
  });
  ASSERT_TRUE(shard_->Release(Handle("a")).ok());
  answered.WaitForNotification();
  if (!answer.ok()) {
    EXPECT_EQ(Reason(answer.status()), v1::SEQUENCE_RELEASED);
  }
  EXPECT_EQ(Reason(Put(kv.Chunk(0, 0, 10))), v1::SEQUENCE_NOT_FOUND);
}

TEST(ShardShutdownTest, QueuedWorkIsAnswered) {
  const TestKv kv = MakeKv(TestShape(2), 6000, 3);
  absl::Notification sealed, selected;
  absl::StatusOr<v1::Sequence> seal_answer;
  SelectBatchAnswer select_answer;
  {
    std::unique_ptr<Shard> shard = Shard::Create(TestOptions()).value();
    v1::OpenSequenceRequest request = OpenRequest("a", kv, 6000);
    request.mutable_index()->set_segment_tokens(0);
    ASSERT_TRUE(shard->OpenSequence(request).ok());
    for (int64_t layer = 0; layer < 2; ++layer) {
      ASSERT_TRUE(shard->PutChunk(Handle("a"), kv.Chunk(layer, 0, 6000)).ok());
    }
    shard->Seal(Handle("a"), CallContext(), [&](absl::StatusOr<v1::Sequence> sequence) {
      seal_answer = std::move(sequence);
      sealed.Notify();
    });
    std::vector<SelectCall> calls(1);
    calls[0].sequence = Handle("a");
    calls[0].layer = 1;
    calls[0].queries = MakeQueries(kv.shape, 1);
    shard->Select(std::move(calls), CallContext(), false, [&](SelectBatchAnswer answer) {
      answer.items[0].pins.reset();
      select_answer = std::move(answer);
      selected.Notify();
    });
  }
  ASSERT_TRUE(sealed.HasBeenNotified());
  ASSERT_TRUE(selected.HasBeenNotified());
  if (!seal_answer.ok()) {
    EXPECT_EQ(seal_answer.status().code(), absl::StatusCode::kCancelled);
  }
  if (!select_answer.items[0].status.ok()) {
    EXPECT_EQ(select_answer.items[0].status.code(), absl::StatusCode::kCancelled);
  }
}

}  // namespace
}  // namespace clusterkv::cache_service
