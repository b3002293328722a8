// A prompt by window beside the same by chunks: the same index, selections and records, and nothing
// of it copied from host memory to the device.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "cache_service/cuda_device.h"
#include "kernels/base/host_id.h"
#include "kernels/comm/peer_window.h"
#include "kernels/ingest/rows_hash.h"
#include "kernels/runtime/device.h"
#include "tests/cache_service/shard_harness.h"

namespace clusterkv::cache_service {
namespace {

constexpr int64_t kPrompt = 700;
constexpr int64_t kSlotBytes = 1 << 20;

// Does as its device until it is told to fail.
class FailingDevice : public ShardDevice {
 public:
  FailingDevice(std::unique_ptr<ShardDevice> device, const std::atomic<bool>* failed)
      : device_(std::move(device)), failed_(*failed) {}

  const std::string& name() const override { return device_->name(); }
  absl::Status Start(const Arena& arena, int lanes) override {
    return device_->Start(arena, lanes);
  }
  bool healthy() const override { return !failed_.load(); }
  void OnFailure(std::function<void(const absl::Status&)> told) override {
    device_->OnFailure(std::move(told));
  }
  absl::Status Upload(absl::Span<const uint32_t> pages) override {
    return failed_ ? Gone() : device_->Upload(pages);
  }
  absl::Status Fetch(absl::Span<const uint32_t> pages) override {
    return failed_ ? Gone() : device_->Fetch(pages);
  }
  absl::Status WriteRows(const PagedRun& run, const char* keys, const char* values) override {
    return failed_ ? Gone() : device_->WriteRows(run, keys, values);
  }
  absl::Status ReadRows(const PagedRun& run, char* keys, char* values) override {
    return failed_ ? Gone() : device_->ReadRows(run, keys, values);
  }
  DeviceCopies copies() const override { return device_->copies(); }
  int64_t memory_bytes() const override { return device_->memory_bytes(); }
  absl::StatusOr<std::unique_ptr<DevicePart>> Mirror(const kernels::IndexPartView& view,
                                                     absl::Span<const uint32_t> pages) override {
    if (failed_) return Gone();
    return device_->Mirror(view, pages);
  }
  absl::StatusOr<std::unique_ptr<DevicePart>> Build(const DeviceBuild& build) override {
    if (failed_) return Gone();
    return device_->Build(build);
  }
  bool CanSelect(const kernels::KvShape& shape, const kernels::SelectParams& select,
                 int64_t clustered_tokens) const override {
    return device_->CanSelect(shape, select, clustered_tokens);
  }
  void Select(absl::Span<DeviceSelectItem> items) override { device_->Select(items); }
  std::string WhyNoLink(v1::Link kind) const override { return device_->WhyNoLink(kind); }
  absl::StatusOr<std::unique_ptr<RecordLink>> Connect(const LinkSetup& setup,
                                                      std::string* unique_id) override {
    return device_->Connect(setup, unique_id);
  }
  absl::StatusOr<std::unique_ptr<DeviceResident>> StartResident(
      const ResidentSetup& setup, absl::Span<const DeviceSelectItem> items) override {
    return device_->StartResident(setup, items);
  }
  absl::StatusOr<std::unique_ptr<RowWindow>> OpenWindow(const std::string& handle,
                                                        int64_t bytes) override {
    return device_->OpenWindow(handle, bytes);
  }

 private:
  static absl::Status Gone() { return absl::UnavailableError("the test ended the device"); }
  const std::unique_ptr<ShardDevice> device_;
  const std::atomic<bool>& failed_;
};

// A prefill worker with a window of one slot for keys and one for values.
class Prefiller {
 public:
  explicit Prefiller(ShardHarness* shard)
      : shard_(*shard), slots_(kernels::DeviceBuffer::Create(0, 2 * kSlotBytes).value()) {
    std::memset(slots_.data(), 0, 2 * kSlotBytes);  // a window may be read before it is filled
    bool resumed = false;
    session_id_ = shard_->OpenSession("prefill", 0, {}, &resumed).value();
    const v1::ConnectIngestResponse response = Connect(kernels::HostId());
    EXPECT_EQ(response.reason(), "");
    window_id_ = response.window_id();
    EXPECT_NE(window_id_, 0u);
  }
  ~Prefiller() { shard_->CloseSession(session_id_, /*now=*/true); }

  v1::ConnectIngestResponse Connect(const std::string& host) {
    v1::ConnectIngestRequest request;
    request.set_session_id(session_id_);
    request.set_handle(kernels::ExportWindow(slots_).value());
    request.set_bytes(static_cast<uint64_t>(slots_.bytes()));
    request.set_host(host);
    return shard_->ConnectIngest(request).value();
  }

  // The chunk's call, its bytes in the slots.
  v1::PutWindowRequest Fill(const std::string& name, const KvChunkView& chunk) {
    std::memcpy(slots_.data(), chunk.keys.data(), chunk.keys.size());
    std::memcpy(slots_.data() + kSlotBytes, chunk.values.data(), chunk.values.size());
    v1::PutWindowRequest request;
    *request.mutable_sequence() = Handle(name);
    request.set_window_id(window_id_);
    request.set_layer(static_cast<uint32_t>(chunk.layer));
    request.set_first_token(static_cast<uint32_t>(chunk.first_token));
    request.set_tokens(static_cast<uint32_t>(chunk.tokens));
    request.set_values_offset(kSlotBytes);
    request.set_checksum(
        kernels::RowsHash(chunk.keys.data(), chunk.values.data(), chunk.keys.size()));
    return request;
  }
  absl::Status Put(const std::string& name, const KvChunkView& chunk) {
    return shard_->PutWindow(Fill(name, chunk));
  }
  // Opens, puts every layer in pieces of `step` tokens, seals.
  v1::Sequence Ready(const v1::OpenSequenceRequest& open, const TestKv& kv, int64_t step) {
    EXPECT_TRUE(shard_->OpenSequence(open).ok());
    for (int64_t layer = 0; layer < int64_t{kv.shape.layers()}; ++layer) {
      const auto& query_rms = kv.layers[static_cast<size_t>(layer)].query_rms;
      EXPECT_TRUE(shard_->PutStatistics(Handle(open.name()), layer, query_rms).ok());
      for (int64_t begin = 0; begin < kPrompt; begin += step) {
        const absl::Status put =
            Put(open.name(), kv.Chunk(layer, begin, std::min(step, kPrompt - begin)));
        EXPECT_TRUE(put.ok()) << put;
      }
    }
    const absl::StatusOr<v1::Sequence> sealed = shard_.Seal(open.name());
    EXPECT_TRUE(sealed.ok()) << sealed.status();
    return sealed.ok() ? *sealed : v1::Sequence();
  }
  void EndSession() { shard_->CloseSession(session_id_, /*now=*/true); }

 private:
  ShardHarness& shard_;
  kernels::DeviceBuffer slots_;
  uint64_t session_id_ = 0, window_id_ = 0;
};

class ShardWindowTest : public ::testing::Test {
 protected:
  std::unique_ptr<ShardHarness> Make(int64_t page_bytes = 32 << 10) {
    TestDevice() = [this] {
      return std::make_unique<FailingDevice>(CreateCudaDevice(0).value(), &failed_);
    };
    ShardOptions options = TestOptions();
    options.page_bytes = page_bytes;
    options.session_ttl = absl::Hours(1);  // nothing beats here, and the emulator takes its time
    return std::make_unique<ShardHarness>(options);
  }

  // What the two sequences of two shards answer, bit for bit.
  static void ExpectSame(ShardHarness& got, ShardHarness& want, const TestKv& kv) {
    const v1::Sequence a = got->GetSequence(Handle("a")).value();
    const v1::Sequence b = want->GetSequence(Handle("a")).value();
    for (int64_t layer = 0; layer < int64_t{kv.shape.layers()}; ++layer) {
      const int index = static_cast<int>(layer);
      EXPECT_EQ(a.layers(index).index_digest(), b.layers(index).index_digest()) << layer;
      const SelectAnswer left = got.SelectOne("a", layer, MakeQueries(kv.shape, 9));
      const SelectAnswer right = want.SelectOne("a", layer, MakeQueries(kv.shape, 9));
      ASSERT_TRUE(left.status.ok()) << left.status;
      ASSERT_TRUE(right.status.ok()) << right.status;
      for (size_t h = 0; h < right.heads.size(); ++h) {
        EXPECT_EQ(left.heads[h].positions, right.heads[h].positions) << h;
        EXPECT_EQ(left.heads[h].slots, right.heads[h].slots) << h;
        EXPECT_EQ(left.heads[h].state_output, right.heads[h].state_output) << h;
        EXPECT_EQ(left.heads[h].state_lse, right.heads[h].state_lse) << h;
      }
      const auto steady = got->GetSteadyZone(Handle("a"), layer).value();
      EXPECT_EQ(steady.heads, want->GetSteadyZone(Handle("a"), layer).value().heads);
      EXPECT_EQ(Records(got, left, layer), Records(want, left, layer));
    }
  }
  static std::vector<std::string> Records(ShardHarness& shard, const SelectAnswer& answer,
                                          int64_t layer) {
    v1::RecallClustersRequest request;
    *request.mutable_sequence() = Handle("a");
    request.set_layer(static_cast<uint32_t>(layer));
    for (size_t h = 0; h < answer.heads.size(); ++h) {
      v1::RecallClustersRequest::Head& head = *request.add_heads();
      head.set_kv_head(static_cast<uint32_t>(h));
      for (const int32_t position : answer.heads[h].positions) {
        head.add_positions(static_cast<uint32_t>(position));
      }
    }
    const Shard::RecallAnswer recalled = shard->Recall(request).value();
    std::vector<std::string> records;
    for (const auto& head : recalled.heads) {
      for (const std::byte* record : head.records) {
        records.emplace_back(reinterpret_cast<const char*>(record),
                             static_cast<size_t>(recalled.record_bytes));
      }
    }
    return records;
  }

  void Compare(const char* preset, const char* codec, v1::ElementType type, int64_t page_bytes,
               int64_t step) {
    const TestKv kv = MakeKv(TestShape(2, type), kPrompt, 1);
    v1::OpenSequenceRequest open = OpenRequest("a", kv, kPrompt);
    open.set_preset(preset);
    open.set_codec(codec);
    if (open.preset() == "clusterkv") open.mutable_select()->clear_coded_tokens();  // has no codes
    const auto by_window = Make(page_bytes), by_chunks = Make(page_bytes);
    Prefiller prefiller(by_window.get());
    prefiller.Ready(open, kv, step);
    by_chunks->Ready(open, kv);
    ExpectSame(*by_window, *by_chunks, kv);
    const v1::Stats stats = (*by_window)->GetStats();
    EXPECT_EQ(stats.window_bytes(), stats.ingested_bytes());
    EXPECT_EQ(stats.window_bytes(), static_cast<uint64_t>(2 * 2 * kPrompt * kv.row_bytes()));
    EXPECT_EQ((*by_chunks)->GetStats().window_bytes(), 0u);
  }

  std::atomic<bool> failed_{false};
};

TEST_F(ShardWindowTest, IsBitForBitWhatChunksAre) {
  Compare("default", "raw", v1::ELEMENT_TYPE_BFLOAT16, 32 << 10, kPrompt);
  Compare("default", "k8v4", v1::ELEMENT_TYPE_FLOAT16, 4 << 10, 67);
  Compare("recall", "raw", v1::ELEMENT_TYPE_FLOAT32, 8 << 10, 13);
}

TEST_F(ShardWindowTest, WhatTheHostBuildsItFetches) {
  Compare("clusterkv", "raw", v1::ELEMENT_TYPE_BFLOAT16, 32 << 10, 300);  // a random start
}

TEST_F(ShardWindowTest, NothingIsCopiedFromTheHostToTheDevice) {
  const TestKv kv = MakeKv(TestShape(), kPrompt, 1);
  const auto by_window = Make(), by_chunks = Make();
  Prefiller prefiller(by_window.get());
  prefiller.Ready(OpenRequest("a", kv, kPrompt), kv, 100);
  by_chunks->Ready(OpenRequest("a", kv, kPrompt), kv);
  EXPECT_EQ((*by_window)->GetStats().device_uploaded_bytes(), 0u);
  EXPECT_GE((*by_chunks)->GetStats().device_uploaded_bytes(),
            (*by_chunks)->GetStats().ingested_bytes());
  // Outwards: the sinks, and the part as with chunks.
  EXPECT_GT((*by_window)->GetStats().device_fetched_bytes(), 0u);
}

TEST_F(ShardWindowTest, WhatIsNotFiniteIsRefusedByName) {
  TestKv kv = MakeKv(TestShape(), kPrompt, 1);
  const auto shard = Make();
  Prefiller prefiller(shard.get());
  ASSERT_TRUE((*shard)->OpenSequence(OpenRequest("a", kv, kPrompt)).ok());
  const TestKv whole = kv;
  // bfloat16 infinity, in head 1, channel 3 of token 40; a NaN in a value of a sink.
  const uint16_t infinity = 0x7f80, nan = 0x7fc1;
  std::memcpy(&kv.layers[1].keys[40 * 128 + 64 + 6], &infinity, 2);
  absl::Status refused = prefiller.Put("a", kv.Chunk(1, 10, 90));
  EXPECT_EQ(Reason(refused), v1::NON_FINITE_KEY);
  EXPECT_EQ(Metadata(refused, "field"), "keys");
  EXPECT_EQ(Metadata(refused, "layer"), "1");
  EXPECT_EQ(Metadata(refused, "token"), "40");
  EXPECT_EQ(Metadata(refused, "head"), "1");
  EXPECT_EQ(Metadata(refused, "channel"), "3");
  std::memcpy(&kv.layers[0].values[2 * 128], &nan, 2);
  refused = prefiller.Put("a", kv.Chunk(0, 0, 90));
  EXPECT_EQ(Reason(refused), v1::NON_FINITE_KEY);
  EXPECT_EQ(Metadata(refused, "field"), "values");
  EXPECT_EQ(Metadata(refused, "token"), "2");
  // What was refused left nothing behind.
  EXPECT_TRUE(prefiller.Put("a", whole.Chunk(1, 10, 90)).ok());
  EXPECT_TRUE(prefiller.Put("a", whole.Chunk(0, 0, 90)).ok());
}

TEST_F(ShardWindowTest, WhatLiesBeyondTheWindowIsRefused) {
  const TestKv kv = MakeKv(TestShape(), kPrompt, 1);
  const auto shard = Make();
  Prefiller prefiller(shard.get());
  ASSERT_TRUE((*shard)->OpenSequence(OpenRequest("a", kv, kPrompt)).ok());
  const v1::PutWindowRequest good = prefiller.Fill("a", kv.Chunk(0, 0, 100));
  const auto expect_field = [&](const v1::PutWindowRequest& request, const char* field) {
    const absl::Status status = (*shard)->PutWindow(request);
    EXPECT_EQ(Reason(status), v1::INVALID_FIELD) << status;
    EXPECT_EQ(Metadata(status, "field"), field) << status;
  };
  v1::PutWindowRequest bad = good;
  for (const uint64_t offset : {uint64_t{2 * kSlotBytes - 100 * 128 + 16}, uint64_t{8},
                                uint64_t{2 * kSlotBytes}, ~uint64_t{15}, uint64_t{1} << 62}) {
    bad.set_keys_offset(offset);
    expect_field(bad, "keys_offset");
  }
  bad = good;
  bad.set_values_offset(uint64_t{2 * kSlotBytes - 100 * 128 + 16});
  expect_field(bad, "values_offset");
  bad = good;
  bad.set_tokens(kPrompt + 1);
  EXPECT_EQ(Reason((*shard)->PutWindow(bad)), v1::TOKENS_OUT_OF_RANGE);
  bad = good;
  bad.set_layer(2);
  EXPECT_EQ(Reason((*shard)->PutWindow(bad)), v1::LAYER_OUT_OF_RANGE);
  bad = good;
  bad.set_window_id(good.window_id() + 1);
  EXPECT_EQ(Reason((*shard)->PutWindow(bad)), v1::WINDOW_NOT_FOUND);
  // The last bytes of the window are a chunk's.
  bad = good;
  bad.set_checksum(0);
  bad.set_values_offset(uint64_t{2 * kSlotBytes - 100 * 128});
  EXPECT_TRUE((*shard)->PutWindow(bad).ok());
}

TEST_F(ShardWindowTest, ASlotThatWasWrittenOverIsFoundOut) {
  const TestKv kv = MakeKv(TestShape(), kPrompt, 1);
  const auto shard = Make();
  Prefiller prefiller(shard.get());
  ASSERT_TRUE((*shard)->OpenSequence(OpenRequest("a", kv, kPrompt)).ok());
  const v1::PutWindowRequest first = prefiller.Fill("a", kv.Chunk(0, 0, 100));
  const v1::PutWindowRequest second = prefiller.Fill("a", kv.Chunk(0, 100, 100));
  EXPECT_EQ(Reason((*shard)->PutWindow(first)), v1::CHECKSUM_MISMATCH);
  EXPECT_TRUE((*shard)->PutWindow(second).ok());
}

TEST_F(ShardWindowTest, ChunksComeBothWaysAndTwice) {
  for (const char* codec : {"raw", "k8v4"}) {
    const TestKv kv = MakeKv(TestShape(), kPrompt, 1), other = MakeKv(TestShape(), kPrompt, 2);
    v1::OpenSequenceRequest open = OpenRequest("a", kv, kPrompt);
    open.set_codec(codec);
    const auto mixed = Make(), by_chunks = Make();
    by_chunks->Ready(open, kv);
    Prefiller prefiller(mixed.get());
    ASSERT_TRUE((*mixed)->OpenSequence(open).ok());
    const auto put = [&](const KvChunkView& chunk) {
      return (*mixed)->PutChunk(Handle("a"), chunk);
    };
    for (int64_t layer : {0, 1}) {
      const auto& rms = kv.layers[static_cast<size_t>(layer)].query_rms;
      ASSERT_TRUE((*mixed)->PutStatistics(Handle("a"), layer, rms).ok());
    }
    // Layer 0 begins by window, layer 1 by chunks.
    EXPECT_TRUE(prefiller.Put("a", kv.Chunk(0, 0, 100)).ok());
    EXPECT_TRUE(put(kv.Chunk(0, 90, 210)).ok());
    EXPECT_TRUE(put(kv.Chunk(1, 0, 100)).ok());
    EXPECT_TRUE(prefiller.Put("a", kv.Chunk(1, 90, 210)).ok());
    for (int64_t layer : {0, 1}) {
      EXPECT_TRUE(put(kv.Chunk(layer, 5, 250)).ok()) << "again";
      EXPECT_TRUE(prefiller.Put("a", kv.Chunk(layer, 5, 250)).ok()) << "again";
      EXPECT_EQ(Reason(put(other.Chunk(layer, 5, 250))), v1::CHUNK_CONFLICT);
      EXPECT_EQ(Reason(prefiller.Put("a", other.Chunk(layer, 5, 250))), v1::CHUNK_CONFLICT);
      EXPECT_TRUE(prefiller.Put("a", kv.Chunk(layer, 300, 200)).ok());
      EXPECT_TRUE(put(kv.Chunk(layer, 500, 200)).ok());
    }
    ASSERT_TRUE(mixed->Seal("a").ok());
    ExpectSame(*mixed, *by_chunks, kv);
    // Clustered: what came by the one way comes again by the other.
    for (int64_t begin : {300, 500}) {
      for (int64_t layer : {0, 1}) {
        EXPECT_TRUE(put(kv.Chunk(layer, begin, 200)).ok()) << codec << begin;
        EXPECT_TRUE(prefiller.Put("a", kv.Chunk(layer, begin, 200)).ok()) << codec << begin;
        EXPECT_EQ(Reason(put(other.Chunk(layer, begin, 200))), v1::CHUNK_CONFLICT);
        EXPECT_EQ(Reason(prefiller.Put("a", other.Chunk(layer, begin, 200))), v1::CHUNK_CONFLICT);
      }
    }
  }
}

TEST_F(ShardWindowTest, AWindowEndsWithItsSession) {
  const TestKv kv = MakeKv(TestShape(), kPrompt, 1);
  const auto shard = Make();
  Prefiller gone(shard.get()), stays(shard.get());
  v1::OpenSequenceRequest open = OpenRequest("a", kv, kPrompt);
  ASSERT_TRUE((*shard)->OpenSequence(open).ok());
  EXPECT_EQ((*shard)->GetStats().ingest_windows(), 2u);
  EXPECT_TRUE(gone.Put("a", kv.Chunk(0, 0, 100)).ok());
  gone.EndSession();
  EXPECT_EQ((*shard)->GetStats().ingest_windows(), 1u);
  EXPECT_EQ(Reason(gone.Put("a", kv.Chunk(0, 100, 100))), v1::WINDOW_NOT_FOUND);
  // What it put stays; another worker goes on.
  EXPECT_TRUE(stays.Put("a", kv.Chunk(0, 100, 600)).ok());
  EXPECT_THAT((*shard)->CompleteLayers(Handle("a")), ::testing::ElementsAre(0));
  v1::ConnectIngestRequest request;
  request.set_session_id(17);
  request.set_bytes(1);
  EXPECT_EQ(Reason((*shard)->ConnectIngest(request).status()), v1::SESSION_NOT_FOUND);
}

TEST_F(ShardWindowTest, AWorkerOfAnotherHostIsToldWhyNot) {
  const auto shard = Make();
  Prefiller prefiller(shard.get());
  const v1::ConnectIngestResponse response = prefiller.Connect("elsewhere");
  EXPECT_EQ(response.window_id(), 0u);
  EXPECT_THAT(response.reason(), ::testing::HasSubstr("another host"));
}

TEST_F(ShardWindowTest, RowsThatWereLostWithTheDeviceAreAnError) {
  const TestKv kv = MakeKv(TestShape(), kPrompt, 1);
  const auto shard = Make();
  Prefiller prefiller(shard.get());
  ASSERT_TRUE((*shard)->OpenSequence(OpenRequest("a", kv, kPrompt)).ok());
  ASSERT_TRUE(prefiller.Put("a", kv.Chunk(0, 0, 600)).ok());
  ASSERT_TRUE((*shard)->PutChunk(Handle("a"), kv.Chunk(1, 0, 600)).ok());
  failed_ = true;
  EXPECT_EQ(Reason(prefiller.Put("a", kv.Chunk(0, 600, 100))), v1::DEVICE_LOST);
  EXPECT_EQ(Reason((*shard)->PutChunk(Handle("a"), kv.Chunk(0, 600, 100))), v1::DEVICE_LOST);
  // The other layer lies in host memory.
  EXPECT_TRUE((*shard)->PutChunk(Handle("a"), kv.Chunk(1, 600, 100)).ok());
  EXPECT_THAT((*shard)->CompleteLayers(Handle("a")), ::testing::ElementsAre(1));
  EXPECT_TRUE((*shard)->Release(Handle("a")).ok());
}

}  // namespace
}  // namespace clusterkv::cache_service
