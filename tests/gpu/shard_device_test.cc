// A shard with a device beside one without: the same index, selections and states.
#include <cuda_runtime.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "cache_service/cuda_device.h"
#include "kernels/base/host_id.h"
#include "kernels/hot_cache/hot_cache.h"
#include "tests/cache_service/shard_harness.h"
#include "worker/cuda_window.h"

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
    ASSERT_EQ(got.corrections.size(), want.corrections.size());
    for (size_t h = 0; h < got.corrections.size(); ++h) {
      EXPECT_EQ(got.corrections[h].codes, want.corrections[h].codes) << h;
      EXPECT_EQ(got.corrections[h].log_scales, want.corrections[h].log_scales) << h;
    }
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

// One token's K then V of one KV head, as they came: the raw record.
std::string RawRecord(const TestKv& kv, int64_t layer, int64_t head, int64_t token) {
  const size_t bytes = static_cast<size_t>(kv.row_bytes()) / kv.shape.kv_heads();
  const size_t at = static_cast<size_t>(token * kv.row_bytes()) + static_cast<size_t>(head) * bytes;
  const TestKv::Layer& rows = kv.layers[static_cast<size_t>(layer)];
  return rows.keys.substr(at, bytes) + rows.values.substr(at, bytes);
}

constexpr int64_t kCapacity = 96;

// A worker of sequence "a" with a window of its own, on the shard's device.
class PeerWorker {
 public:
  PeerWorker(ShardHarness* shard, const TestKv& kv) : shard_(*shard), kv_(kv) {
    v1::AttachRequest attach;
    *attach.mutable_sequence() = Handle("a");
    attach.mutable_hot_cache()->set_capacity_tokens(kCapacity);
    attach.add_links(v1::LINK_PEER);
    attach.set_host(kernels::HostId());
    const v1::AttachResponse attached = shard_->Attach(attach).value();
    EXPECT_EQ(attached.link(), v1::LINK_PEER) << attached.link_reason();
    attachment_id_ = attached.attachment_id();
    kernels::HotCacheParams params;
    params.capacity_tokens = kCapacity;
    params.step_tokens = attached.max_exact_tokens();
    for (uint32_t h = 0; h < kv.shape.kv_heads(); ++h) {
      mirrors_.push_back(kernels::HotCache::Create(params).value());
    }
    worker::RecordWindow::Layout layout;
    layout.layers = kv.shape.layers();
    layout.kv_heads = kv.shape.kv_heads();
    layout.slots = mirrors_[0].slot_count();
    layout.record_bytes = record_bytes();
    layout.max_records = layout.kv_heads * params.step_tokens;
    window_ = worker::MakeCudaWindow(0, layout).value();
  }

  v1::ConnectLinkResponse Connect(v1::Link link) {
    v1::ConnectLinkRequest connect;
    connect.set_attachment_id(attachment_id_);
    connect.set_link(link);
    *connect.mutable_window() = window_->Export().value();
    return shard_->ConnectLink(connect).value();
  }

  SelectAnswer Select(uint64_t step) {
    std::vector<SelectCall> calls(1);
    calls[0].attachment_id = attachment_id_;
    calls[0].layer = 1;
    calls[0].queries = MakeQueries(kv_.shape, 100 + step);
    calls[0].recall = true;
    calls[0].step = step;
    return shard_.Select(std::move(calls)).items[0];
  }

  // Expects the records that the step missed to be in this worker's slots; returns how many.
  int64_t TakeAndCompare(const SelectAnswer& answer) {
    std::vector<worker::LinkedRecord> linked;
    std::vector<std::string> expected;
    std::vector<std::string> got(static_cast<size_t>(answer.misses),
                                 std::string(static_cast<size_t>(record_bytes()), '?'));
    for (size_t h = 0; h < answer.heads.size(); ++h) {
      const std::vector<int32_t>& positions = answer.heads[h].positions;
      std::vector<int32_t> slots(positions.size());
      std::vector<uint8_t> hits(positions.size());
      EXPECT_TRUE(
          mirrors_[h].Resolve(positions, {}, absl::MakeSpan(slots), absl::MakeSpan(hits)).ok());
      EXPECT_TRUE(answer.recalls[h].records.empty());
      for (size_t i = 0; i < positions.size(); ++i) {
        if (hits[i] != 0) continue;
        auto* copy = reinterpret_cast<std::byte*>(got.at(linked.size()).data());
        linked.push_back({static_cast<int64_t>(h), slots[i], copy});
        expected.push_back(RawRecord(kv_, 1, static_cast<int64_t>(h), positions[i]));
      }
    }
    EXPECT_EQ(static_cast<int64_t>(linked.size()), answer.misses);
    EXPECT_TRUE(window_->Take(v1::LINK_PEER, 1, linked, absl::InfiniteFuture()).ok());
    EXPECT_EQ(got, expected);
    return answer.misses;
  }

  int64_t record_bytes() const { return static_cast<int64_t>(RawRecord(kv_, 0, 0, 0).size()); }

 private:
  ShardHarness& shard_;
  const TestKv& kv_;
  uint64_t attachment_id_ = 0;
  std::vector<kernels::HotCache> mirrors_;  // [kv_heads]
  std::unique_ptr<worker::RecordWindow> window_;
};

TEST_F(ShardDeviceTest, APeerLinkPutsRecordsIntoTheWorkersSlots) {
  const TestKv kv = MakeKv(TestShape(), kPrompt, 1);
  const auto shard = Make(true, 32 << 10);
  shard->Ready(OpenRequest("a", kv, kPrompt), kv);
  PeerWorker worker(shard.get(), kv);
  const v1::ConnectLinkResponse connected = worker.Connect(v1::LINK_PEER);
  ASSERT_EQ(connected.link(), v1::LINK_PEER) << connected.link_reason();
  EXPECT_EQ(connected.generation(), 1u);
  int64_t recalled = 0;
  for (uint64_t step = 0; step < 5; ++step) {
    const SelectAnswer answer = worker.Select(step);
    ASSERT_TRUE(answer.status.ok()) << answer.status;
    ASSERT_TRUE(answer.by_link);
    EXPECT_EQ(answer.link_generation, 1u);
    recalled += worker.TakeAndCompare(answer);
  }
  EXPECT_GT(recalled, 0);
  EXPECT_EQ((*shard)->GetStats().link_bytes(),
            static_cast<uint64_t>(recalled * worker.record_bytes()));
  EXPECT_EQ((*shard)->GetStats().links(), 1u);

  // Taken away, records come in the answer again.
  EXPECT_EQ(worker.Connect(v1::LINK_GRPC).link(), v1::LINK_GRPC);
  EXPECT_EQ((*shard)->GetStats().links(), 0u);
  const SelectAnswer answer = worker.Select(5);
  ASSERT_TRUE(answer.status.ok()) << answer.status;
  EXPECT_FALSE(answer.by_link);
  EXPECT_EQ(answer.recalls[0].records.size(), answer.recalls[0].positions.size());
}

TEST_F(ShardDeviceTest, AWindowThatIsTooSmallIsRefused) {
  const TestKv kv = MakeKv(TestShape(), kPrompt, 1);
  const auto shard = Make(true, 32 << 10);
  shard->Ready(OpenRequest("a", kv, kPrompt), kv);
  v1::AttachRequest attach;
  *attach.mutable_sequence() = Handle("a");
  attach.mutable_hot_cache()->set_capacity_tokens(96);
  v1::ConnectLinkRequest connect;
  connect.set_attachment_id((*shard)->Attach(attach).value().attachment_id());
  connect.set_link(v1::LINK_PEER);
  connect.mutable_window()->set_head_bytes(96 * 128 - 1);
  connect.mutable_window()->set_layer_bytes(1 << 20);
  connect.mutable_window()->set_bytes(2 << 20);
  const absl::Status status = (*shard)->ConnectLink(connect).status();
  EXPECT_EQ(Reason(status), v1::INVALID_FIELD);
  EXPECT_EQ(Metadata(status, "field"), "window.head_bytes");
  connect.set_attachment_id(1);
  EXPECT_EQ(Reason((*shard)->ConnectLink(connect).status()), v1::ATTACHMENT_NOT_FOUND);
}

class ShardDeviceDeathTest : public ShardDeviceTest {
 protected:
  // In a process of its own, which it ends: with 0 if all was as it should be.
  [[noreturn]] static void FailAndGoOn() {
    const TestKv kv = MakeKv(TestShape(), kPrompt + 64, 1);
    const auto host = Make(false, 32 << 10);
    std::vector<absl::Status> told;
    TestDevice() = [&told] {
      std::unique_ptr<ShardDevice> device = CreateCudaDevice(0).value();
      device->OnFailure([&told](const absl::Status& why) { told.push_back(why); });
      return device;
    };
    {
      ShardHarness shard(Options(32 << 10));
      const auto expect_same = [&](const std::string& name) {
        for (int64_t layer : {0, 1}) {
          ExpectClose(shard.SelectOne(name, layer, MakeQueries(kv.shape, 2)),
                      host->SelectOne(name, layer, MakeQueries(kv.shape, 2)));
        }
      };
      v1::OpenSequenceRequest open = OpenRequest("before", kv, kPrompt);
      open.set_max_decode_tokens(64);
      open.mutable_index()->set_window_tokens(64);
      for (ShardHarness* one : {&shard, host.get()}) one->Ready(open, kv);
      expect_same("before");
      EXPECT_EQ(shard->GetStats().device_selects(), 2u);
      cuda_emulator::Fail();
      expect_same("before");
      open.set_name("after");
      for (ShardHarness* one : {&shard, host.get()}) {
        EXPECT_TRUE((*one)->Append(AppendRequest("before", kv, kPrompt, 64)).ok());
        one->Ready(open, kv);
      }
      expect_same("before");
      expect_same("after");
      const v1::Stats stats = shard->GetStats();
      EXPECT_EQ(stats.device(), "cuda:0 failed");
      EXPECT_EQ(stats.device_selects(), 2u);
    }
    EXPECT_EQ(told.size(), 1u);
    std::_Exit(HasFailure() ? 1 : 0);
  }
};

TEST_F(ShardDeviceDeathTest, AFailedDeviceLeavesAllToTheHost) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(FailAndGoOn(), testing::ExitedWithCode(0), "");
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
