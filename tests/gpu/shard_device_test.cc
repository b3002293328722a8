// A shard with a device beside one without: the same index, selections and states.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <utility>
#include <vector>

#include "cache_service/cuda_device.h"
#include "tests/cache_service/shard_harness.h"

namespace clusterkv::cache_service {
namespace {

constexpr int64_t kPrompt = 700;

// Does as its device until it is told to fail.
class ShardDeviceTest : public ::testing::Test {
 protected:
  static ShardOptions Options(int64_t page_bytes) {
    ShardOptions options = TestOptions();
    options.page_bytes = page_bytes;
    return options;
  }
  static std::unique_ptr<ShardHarness> Make(bool with_device, int64_t page_bytes) {
    if (with_device) {
      TestDevice() = [] { return CreateCudaDevice(0).value(); };
    } else {
      TestDevice() = nullptr;
    }
    return std::make_unique<ShardHarness>(Options(page_bytes));
  }

  static void ExpectClose(const SelectAnswer& got, const SelectAnswer& want) {
    ASSERT_TRUE(got.status.ok()) << got.status;
    ASSERT_TRUE(want.status.ok()) << want.status;
    ASSERT_EQ(got.heads.size(), want.heads.size());
    EXPECT_EQ(got.window_begin, want.window_begin);
    EXPECT_EQ(got.estimated_tokens, want.estimated_tokens);
    for (size_t h = 0; h < got.heads.size(); ++h) {
      EXPECT_EQ(got.heads[h].positions, want.heads[h].positions) << h;
      EXPECT_EQ(got.heads[h].parts, want.heads[h].parts) << h;
      EXPECT_EQ(got.heads[h].slots, want.heads[h].slots) << h;
      EXPECT_EQ(got.heads[h].clusters, want.heads[h].clusters) << h;
      EXPECT_EQ(got.heads[h].coded_tokens, want.heads[h].coded_tokens) << h;
      ASSERT_EQ(got.heads[h].state_output.size(), want.heads[h].state_output.size());
      for (size_t i = 0; i < got.heads[h].state_output.size(); ++i) {
        const float g = got.heads[h].state_output[i], w = want.heads[h].state_output[i];
        EXPECT_TRUE(std::abs(g - w) <= 1e-3f) << h << " " << i << ": " << g << " for " << w;
      }
    }
  }

  // Prompt, then decoded tokens that fill two windows; selects after each.
  void Compare(int64_t page_bytes, const char* codec) {
    const TestKv kv = MakeKv(TestShape(), kPrompt + 200, 1);
    const auto device = Make(true, page_bytes), host = Make(false, page_bytes);
    v1::OpenSequenceRequest open = OpenRequest("a", kv, kPrompt);
    open.set_codec(codec);
    open.set_max_decode_tokens(200);
    open.mutable_index()->set_window_tokens(64);
    for (ShardHarness* shard : {device.get(), host.get()}) shard->Ready(open, kv);
    for (int64_t appended : {0, 64, 150}) {
      for (ShardHarness* shard : {device.get(), host.get()}) {
        if (appended == 0) continue;
        const int64_t from = kPrompt + (appended == 64 ? 0 : 64);
        ASSERT_TRUE((*shard)->Append(AppendRequest("a", kv, from, kPrompt + appended - from)).ok());
      }
      for (int64_t layer : {0, 1}) {
        ExpectClose(device->SelectOne("a", layer, MakeQueries(kv.shape, 2 + appended)),
                    host->SelectOne("a", layer, MakeQueries(kv.shape, 2 + appended)));
      }
    }
    const auto digest = [](ShardHarness& shard) {
      const v1::Sequence sequence = shard->GetSequence(Handle("a")).value();
      return std::pair(sequence.layers(0).index_digest(), sequence.layers(1).index_digest());
    };
    EXPECT_EQ(digest(*device), digest(*host));
    const v1::Stats stats = (*device)->GetStats();
    EXPECT_EQ(stats.device(), "cuda:0");
    EXPECT_EQ(stats.device_selects(), 6u);
    EXPECT_EQ(stats.device_fallbacks(), 0u);
    EXPECT_EQ((*host)->GetStats().device(), "cpu");
  }
};

TEST_F(ShardDeviceTest, AnswersAsTheHost) { Compare(32 << 10, "raw"); }
TEST_F(ShardDeviceTest, AnswersAsTheHostFromSmallPagesAndCodedRecords) { Compare(4 << 10, "k8v4"); }

TEST_F(ShardDeviceTest, ABatchOfDifferentSequencesIsAnsweredItemByItem) {
  const TestKv kv = MakeKv(TestShape(), kPrompt, 1);
  const auto device = Make(true, 32 << 10), host = Make(false, 32 << 10);
  std::vector<SelectAnswer> answers[2];
  int which = 0;
  for (ShardHarness* shard : {device.get(), host.get()}) {
    shard->Ready(OpenRequest("long", kv, kPrompt), kv);
    shard->Ready(OpenRequest("short", kv, 90), kv);
    std::vector<SelectCall> calls;
    for (int i = 0; i < 6; ++i) {
      SelectCall& call = calls.emplace_back();
      call.sequence = Handle(i % 2 == 0 ? "long" : "short");
      call.layer = i / 3;
      call.queries = MakeQueries(kv.shape, 10 + static_cast<uint64_t>(i));
      if (i == 4) call.select.set_budget_tokens(40);
    }
    answers[which++] = shard->Select(std::move(calls)).items;
  }
  ASSERT_EQ(answers[0].size(), 6u);
  for (size_t i = 0; i < 6; ++i) ExpectClose(answers[0][i], answers[1][i]);
}

TEST_F(ShardDeviceTest, QueriesWhoseLogitsOverflowAreTheHostsError) {
  const TestKv kv = MakeKv(TestShape(), kPrompt, 1);
  const auto device = Make(true, 32 << 10);
  device->Ready(OpenRequest("a", kv, kPrompt), kv);
  std::vector<float> queries = MakeQueries(kv.shape, 3);
  for (float& q : queries) q = 3e38f;
  EXPECT_EQ(Reason(device->SelectOne("a", 0, queries).status), v1::NON_FINITE_QUERY);
}

}  // namespace
}  // namespace clusterkv::cache_service
