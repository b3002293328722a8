// Decoded tokens: appending, windows, the steady zone, forks.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <map>
#include <thread>

#include "tests/cache_service/shard_harness.h"

namespace clusterkv::cache_service {
namespace {

using ::testing::ElementsAre;

constexpr int64_t kPrompt = 300, kDecode = 250, kWindow = 48;

class ShardAppendTest : public ::testing::Test {
 protected:
  v1::OpenSequenceRequest Request(const std::string& name) {
    v1::OpenSequenceRequest request = OpenRequest(name, kv_, kPrompt);
    request.set_max_decode_tokens(kDecode);
    request.mutable_index()->set_window_tokens(kWindow);
    return request;
  }
  absl::StatusOr<v1::AppendKvResponse> Append(int64_t first, int64_t tokens,
                                              const std::string& name = "a") {
    return shard_->Append(AppendRequest(name, kv_, first, tokens));
  }
  v1::Sequence Get(const std::string& name = "a") {
    return shard_->GetSequence(Handle(name)).value();
  }
  // Positions and bytes of the steady zone's window are those of tokens [begin, end).
  void ExpectWindow(int64_t begin, int64_t end, const std::string& name = "a") {
    const Shard::SteadyZone zone = shard_->GetSteadyZone(Handle(name), 1).value();
    ASSERT_EQ(static_cast<int64_t>(zone.positions.size()), 16 + end - begin);
    const size_t head_bytes = static_cast<size_t>(kv_.row_bytes()) / 2;
    for (int64_t token = begin; token < end; ++token) {
      const size_t i = static_cast<size_t>(16 + token - begin);
      ASSERT_EQ(zone.positions[i], token);
      for (size_t head = 0; head < 2; ++head) {
        const size_t at = static_cast<size_t>(token * kv_.row_bytes()) + head * head_bytes;
        ASSERT_EQ(zone.heads[head].substr(i * 2 * head_bytes, 2 * head_bytes),
                  kv_.layers[1].keys.substr(at, head_bytes) +
                      kv_.layers[1].values.substr(at, head_bytes));
      }
    }
  }

  const TestKv kv_ = MakeKv(TestShape(), kPrompt + kDecode, 1);
  ShardHarness shard_;
};

TEST_F(ShardAppendTest, TokensLieInTheWindowUntilItIsFull) {
  shard_.Ready(Request("a"), kv_);
  const v1::AppendKvResponse first = Append(kPrompt, 5).value();
  ASSERT_EQ(first.layers_size(), 2);
  EXPECT_EQ(first.layers(1).tokens(), kPrompt + 5u);
  EXPECT_EQ(first.layers(1).window_begin(), kPrompt + 0u);
  ExpectWindow(kPrompt, kPrompt + 5);
  for (int64_t at = kPrompt + 5; at < kPrompt + kWindow - 1; ++at) ASSERT_TRUE(Append(at, 1).ok());
  ExpectWindow(kPrompt, kPrompt + kWindow - 1);
  const v1::AppendKvResponse full = Append(kPrompt + kWindow - 1, 1).value();
  EXPECT_EQ(full.layers(0).window_begin(), kPrompt + kWindow + 0u);
  ExpectWindow(kPrompt + kWindow, kPrompt + kWindow);
}

TEST_F(ShardAppendTest, SelectAfterAnAppendSeesTheClusteredWindow) {
  shard_.Ready(Request("a"), kv_);
  const uint32_t clusters = Get().layers(0).clusters();
  ASSERT_TRUE(Append(kPrompt, kWindow + 3).ok());
  SelectCall call;
  call.sequence = Handle("a");
  call.layer = 0;
  call.queries = MakeQueries(kv_.shape, 2);
  call.select.set_budget_tokens(10'000);
  std::vector<SelectCall> calls;
  calls.push_back(std::move(call));
  const SelectBatchAnswer batch = shard_.Select(std::move(calls));
  const SelectAnswer& answer = batch.items[0];
  ASSERT_TRUE(answer.status.ok()) << answer.status;
  EXPECT_EQ(answer.window_begin, kPrompt + kWindow);
  EXPECT_EQ(answer.heads[0].positions.size(), static_cast<size_t>(kPrompt - 16 + kWindow));
  EXPECT_EQ(answer.heads[0].positions.back(), kPrompt + kWindow - 1);
  EXPECT_EQ(answer.heads[0].parts.back(), 1);
  EXPECT_EQ(Get().layers(0).clusters(), clusters + kWindow / 16);
  EXPECT_EQ(Get().layers(0).window_begin(), kPrompt + kWindow + 0u);
  shard_.WaitIdle();  // a select waits for its own layer; the other may still be clustered
  EXPECT_EQ(Get().state(), v1::SEQUENCE_STATE_READY);
}

TEST_F(ShardAppendTest, OneAppendMayFillSeveralWindows) {
  shard_.Ready(Request("a"), kv_);
  ASSERT_TRUE(Append(kPrompt, kDecode).ok());
  const int64_t begin = kPrompt + kDecode / kWindow * kWindow;
  ASSERT_EQ(shard_.SelectOne("a", 1, MakeQueries(kv_.shape, 2)).window_begin, begin);
  ExpectWindow(begin, kPrompt + kDecode);
  EXPECT_EQ(Get().tokens(), kPrompt + kDecode + 0u);
}

TEST_F(ShardAppendTest, PiecesOfAnySizeBuildTheSameIndex) {
  std::map<int64_t, uint64_t> digests;
  for (int64_t piece : {1, 7, 48, 100, 250}) {
    shard_.Ready(Request("a"), kv_);
    for (int64_t at = 0; at < kDecode; at += piece) {
      ASSERT_TRUE(Append(kPrompt + at, std::min(piece, kDecode - at)).ok());
    }
    shard_.WaitIdle();
    digests[piece] = Get().layers(1).index_digest();
    ASSERT_TRUE(shard_->Release(Handle("a")).ok());
  }
  for (const auto& [piece, digest] : digests) EXPECT_EQ(digest, digests[1]) << piece;
}

TEST_F(ShardAppendTest, WindowsOfClusterKvHaveFourClusters) {
  v1::OpenSequenceRequest request = Request("a");
  request.set_preset("clusterkv");
  request.clear_select();
  const uint32_t clusters = shard_.Ready(request, kv_).layers(0).clusters();
  ASSERT_TRUE(Append(kPrompt, kWindow).ok());
  shard_.WaitIdle();
  EXPECT_EQ(Get().layers(0).clusters(), clusters + 4);
}

TEST_F(ShardAppendTest, WindowOfZeroIsNeverClustered) {
  v1::OpenSequenceRequest request = Request("a");
  request.mutable_index()->set_window_tokens(0);
  shard_.Ready(request, kv_);
  for (int64_t at = 0; at < kDecode; at += 50) ASSERT_TRUE(Append(kPrompt + at, 50).ok());
  EXPECT_EQ(Get().layers(0).window_begin(), kPrompt + 0u);
  ExpectWindow(kPrompt, kPrompt + kDecode);
}

TEST_F(ShardAppendTest, PromptOfSinksAloneGetsItsFirstPartFromAWindow) {
  v1::OpenSequenceRequest request = Request("a");
  request.set_prompt_tokens(10);
  shard_.Ready(request, kv_);
  ASSERT_TRUE(Append(10, 2 * kWindow + 1).ok());
  const SelectAnswer answer = shard_.SelectOne("a", 0, MakeQueries(kv_.shape, 2));
  ASSERT_TRUE(answer.status.ok()) << answer.status;
  EXPECT_EQ(answer.window_begin, 10 + 2 * kWindow);
  EXPECT_EQ(answer.heads[0].positions.size(), 40u - 10u);
}

TEST_F(ShardAppendTest, DuplicatesAreFineAndConflictsAreNot) {
  TestKv other = kv_;
  other.layers[1].keys[static_cast<size_t>((kPrompt + 3) * kv_.row_bytes())] ^= 1;
  shard_.Ready(Request("a"), kv_);
  ASSERT_TRUE(Append(kPrompt, 10).ok());
  EXPECT_TRUE(Append(kPrompt, 10).ok()) << "a retry";
  EXPECT_TRUE(Append(kPrompt + 5, 10).ok()) << "half of it is new";
  EXPECT_EQ(Reason(shard_->Append(AppendRequest("a", other, kPrompt, 20)).status()),
            v1::CHUNK_CONFLICT);
  EXPECT_EQ(Get().tokens(), kPrompt + 15u) << "nothing of the refused append was written";
  ASSERT_TRUE(Append(kPrompt + 15, kWindow).ok());
  EXPECT_TRUE(Append(kPrompt, 15 + kWindow).ok()) << "clustered or not";
  shard_.WaitIdle();
  EXPECT_TRUE(Append(kPrompt, 15 + kWindow).ok());
  EXPECT_EQ(Reason(shard_->Append(AppendRequest("a", other, kPrompt, 20)).status()),
            v1::CHUNK_CONFLICT);
}

TEST_F(ShardAppendTest, RetriesOfClusteredTokensAreFineUnderALossyCodec) {
  v1::OpenSequenceRequest request = Request("a");
  request.set_codec("k8v4");
  shard_.Ready(request, kv_);
  ASSERT_TRUE(Append(kPrompt, kWindow).ok());
  shard_.WaitIdle();
  EXPECT_TRUE(Append(kPrompt, kWindow).ok());
}

TEST_F(ShardAppendTest, BadAppendsAreRefusedAndNothingIsWritten) {
  shard_->OpenSequence(Request("a")).value();
  EXPECT_EQ(Reason(Append(kPrompt, 1).status()), v1::SEQUENCE_NOT_READY);
  ASSERT_TRUE(shard_.Put("a", kv_, kPrompt).ok());
  ASSERT_TRUE(shard_.Seal("a").ok());
  const absl::Status gap = Append(kPrompt + 1, 1).status();
  EXPECT_EQ(Reason(gap), v1::APPEND_OUT_OF_ORDER);
  EXPECT_EQ(Metadata(gap, "expected"), "300");
  EXPECT_EQ(Reason(Append(kPrompt, 0).status()), v1::TOKENS_OUT_OF_RANGE);
  v1::AppendKvRequest request = AppendRequest("a", kv_, kPrompt, kDecode);
  request.set_tokens(kDecode + 1);
  EXPECT_EQ(Reason(shard_->Append(request).status()), v1::TOKENS_OUT_OF_RANGE);
  request = AppendRequest("a", kv_, kPrompt, 2);
  request.mutable_layers(1)->set_layer(0);
  EXPECT_EQ(Reason(shard_->Append(request).status()), v1::INVALID_FIELD);
  request.mutable_layers(1)->set_layer(5);
  EXPECT_EQ(Reason(shard_->Append(request).status()), v1::LAYER_OUT_OF_RANGE);
  request.mutable_layers(1)->set_layer(1);
  request.mutable_layers(1)->mutable_keys()->pop_back();
  EXPECT_EQ(Reason(shard_->Append(request).status()), v1::SHAPE_MISMATCH);
  request = AppendRequest("a", kv_, kPrompt, 2);
  std::string& values = *request.mutable_layers(1)->mutable_values();
  values[0] = '\xff';
  values[1] = '\x7f';  // bf16 NaN
  EXPECT_EQ(Reason(shard_->Append(request).status()), v1::NON_FINITE_KEY);
  EXPECT_EQ(Get().tokens(), kPrompt + 0u);
  EXPECT_TRUE(Append(kPrompt, 2).ok());
}

TEST_F(ShardAppendTest, LayersMayBeAppendedOneByOne) {
  shard_.Ready(Request("a"), kv_);
  v1::AppendKvRequest request = AppendRequest("a", kv_, kPrompt, 3);
  request.mutable_layers()->DeleteSubrange(0, 1);
  ASSERT_TRUE(shard_->Append(request).ok());
  EXPECT_EQ(Get().tokens(), kPrompt + 0u) << "of the layer that has fewest";
  EXPECT_EQ(Get().layers(1).tokens(), kPrompt + 3u);
  ASSERT_TRUE(Append(kPrompt, 3).ok());
  EXPECT_EQ(Get().tokens(), kPrompt + 3u);
}

// --- forks

v1::ForkSequenceRequest ForkRequest(const std::string& source, const std::string& name,
                                    uint32_t decode) {
  v1::ForkSequenceRequest request;
  *request.mutable_source() = Handle(source);
  request.set_name(name);
  request.set_max_decode_tokens(decode);
  return request;
}

TEST_F(ShardAppendTest, ForksShareThePromptAndGoTheirOwnWay) {
  shard_.Ready(Request("a"), kv_);
  ASSERT_TRUE(Append(kPrompt, kWindow + 7).ok());
  shard_.WaitIdle();
  const uint64_t before = shard_->GetStats().pages().free();
  const v1::Sequence fork = shard_->Fork(ForkRequest("a", "b", 100)).value();
  EXPECT_EQ(fork.state(), v1::SEQUENCE_STATE_READY);
  EXPECT_EQ(fork.tokens(), kPrompt + kWindow + 7u);
  EXPECT_NE(fork.handle().generation(), Get().handle().generation());
  EXPECT_LE(before - shard_->GetStats().pages().free(), 8u) << "only the window's rows are copied";
  EXPECT_EQ(Get("b").layers(1).index_digest(), Get("a").layers(1).index_digest());
  ExpectWindow(kPrompt + kWindow, kPrompt + kWindow + 7, "b");

  // The two continue differently.
  const int64_t at = kPrompt + kWindow + 7;
  ASSERT_TRUE(Append(at, 60).ok());
  TestKv other = MakeKv(kv_.shape, kv_.tokens, 99);
  ASSERT_TRUE(shard_->Append(AppendRequest("b", other, at, 60)).ok());
  shard_.WaitIdle();
  EXPECT_NE(Get("b").layers(1).index_digest(), Get("a").layers(1).index_digest());

  // The source may leave; the fork keeps what it shares.
  ASSERT_TRUE(shard_->Release(Handle("a")).ok());
  shard_.ExpectLedger();
  EXPECT_TRUE(shard_.SelectOne("b", 0, MakeQueries(kv_.shape, 2)).status.ok());
  ASSERT_TRUE(shard_->Release(Handle("b")).ok());
  EXPECT_EQ(shard_->GetStats().pages().free(), shard_->GetStats().pages().total());
}

TEST_F(ShardAppendTest, ForksAreLimitedByTheirOwnDecodeTokens) {
  shard_.Ready(Request("a"), kv_);
  ASSERT_TRUE(Append(kPrompt, 5).ok());
  ASSERT_TRUE(shard_->Fork(ForkRequest("a", "b", 2)).ok());
  EXPECT_TRUE(Append(kPrompt + 5, 2, "b").ok());
  EXPECT_EQ(Reason(Append(kPrompt + 7, 1, "b").status()), v1::TOKENS_OUT_OF_RANGE);
}

TEST_F(ShardAppendTest, ForksOfWhatGrowsMeanwhileMayDecodeWhatTheyAskedFor) {
  shard_.Ready(Request("a"), kv_);
  constexpr int64_t kEnd = kPrompt + kDecode - 4;
  std::thread decoder([&] {
    for (int64_t at = kPrompt; at < kEnd; ++at) EXPECT_TRUE(Append(at, 1).ok());
  });
  for (int64_t end = 0; end < kEnd && !HasFatalFailure();) {
    const auto fork = shard_->Fork(ForkRequest("a", "b", 3));
    if (!fork.ok()) {  // a window is being clustered
      EXPECT_EQ(Reason(fork.status()), v1::SEQUENCE_NOT_READY);
      continue;
    }
    end = fork->tokens();
    EXPECT_TRUE(Append(end, 3, "b").ok());
    EXPECT_EQ(Reason(Append(end + 3, 1, "b").status()), v1::TOKENS_OUT_OF_RANGE);
    ExpectWindow(kPrompt + (end + 3 - kPrompt) / kWindow * kWindow, end + 3, "b");
    EXPECT_TRUE(shard_->Release(Handle("b")).ok());
  }
  decoder.join();
}

TEST_F(ShardAppendTest, ForksAreRefusedByName) {
  shard_->OpenSequence(Request("a")).value();
  EXPECT_EQ(Reason(shard_->Fork(ForkRequest("a", "b", 0)).status()), v1::SEQUENCE_NOT_READY);
  EXPECT_EQ(Reason(shard_->Fork(ForkRequest("c", "b", 0)).status()), v1::SEQUENCE_NOT_FOUND);
  ASSERT_TRUE(shard_.Put("a", kv_, kPrompt).ok());
  ASSERT_TRUE(shard_.Seal("a").ok());
  EXPECT_EQ(Reason(shard_->Fork(ForkRequest("a", "a", 0)).status()), v1::SEQUENCE_EXISTS);
  EXPECT_EQ(Reason(shard_->Fork(ForkRequest("a", "", 0)).status()), v1::INVALID_FIELD);
  v1::ForkSequenceRequest request = ForkRequest("a", "b", 0);
  request.mutable_select()->set_budget_tokens(0);
  EXPECT_EQ(Reason(shard_->Fork(request).status()), v1::BUDGET_ZERO);
  request.mutable_select()->set_budget_tokens(30);
  EXPECT_EQ(shard_->Fork(request).value().select().budget_tokens(), 30u);
  EXPECT_EQ(shard_.SelectOne("b", 0, MakeQueries(kv_.shape, 2)).heads[0].positions.size(), 14u);
}

}  // namespace
}  // namespace clusterkv::cache_service
