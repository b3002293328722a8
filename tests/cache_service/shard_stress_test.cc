// Everything at once: writers, decoders, forks, releases, sessions and the operator on one small
// shard. What comes out is right or a typed error, nothing leaks, and the sanitizers see it all.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <random>
#include <set>
#include <thread>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "tests/cache_service/shard_harness.h"
#include "tests/test_seed.h"

namespace clusterkv::cache_service {
namespace {

constexpr int64_t kPrompt = 200, kDecode = 60, kNames = 5;

// Sequences of one name always hold the same bytes, whatever their generation.
const TestKv& KvOf(int64_t name) {
  static const auto& all = *new std::array<TestKv, kNames>{
      MakeKv(TestShape(), kPrompt + kDecode, 11), MakeKv(TestShape(), kPrompt + kDecode, 12),
      MakeKv(TestShape(), kPrompt + kDecode, 13), MakeKv(TestShape(), kPrompt + kDecode, 14),
      MakeKv(TestShape(), kPrompt + kDecode, 15)};
  return all[static_cast<size_t>(name)];
}

class Stress {
 public:
  explicit Stress(uint64_t seed) : seed_(seed) {}

  void Run() {
    std::vector<std::thread> threads;
    for (uint64_t i = 0; i < 2; ++i) threads.emplace_back([this, i] { Write(seed_ + i); });
    for (uint64_t i = 0; i < 2; ++i) threads.emplace_back([this, i] { Decode(seed_ + 10 + i); });
    threads.emplace_back([this] { Operate(seed_ + 20); });
    for (std::thread& thread : threads) thread.join();
    std::cout << ready_ << " sequences became ready, " << steps_ << " decode steps, " << records_
              << " records compared, " << errors_ << " typed errors\n";
    EXPECT_GT(ready_, 0);
    EXPECT_GT(steps_, 0);
    EXPECT_GT(records_, 0);
  }

 private:
  static ShardOptions Options() {
    ShardOptions options = TestOptions();
    options.arena_bytes = kArenaPages * options.page_bytes;  // room for some of the five
    options.verify_recalls = true;
    options.session_ttl = absl::Milliseconds(200);
    return options;
  }

  // A busy machine may let the writers end before any decoder met a sequence that was ready: then
  // they go on.
  bool SeenAll() const { return records_ > 0 || absl::Now() > limit_; }

  // An answer is fine or says by name what somebody else did to it.
  bool Fine(const absl::Status& status) {
    if (status.ok()) return true;
    ++errors_;
    static const auto& expected = *new std::set<v1::ErrorReason>{
        v1::SEQUENCE_NOT_FOUND, v1::SEQUENCE_EXISTS,     v1::STALE_GENERATION,
        v1::SEQUENCE_NOT_READY, v1::SEQUENCE_RELEASED,   v1::LAYER_NOT_READY,
        v1::ARENA_FULL,         v1::LIMIT_EXCEEDED,      v1::ATTACHMENT_NOT_FOUND,
        v1::CHUNKS_MISSING,     v1::APPEND_OUT_OF_ORDER, v1::SESSION_NOT_FOUND,
        v1::RESIDENCY_STALE};
    EXPECT_TRUE(expected.contains(ReasonOf(status))) << status;
    return false;
  }

  // Who writes by name alone may go on in another's sequence: with a layer's last chunk, before the
  // other has put its statistics.
  static bool IsLateStatistics(const absl::Status& status) {
    return Reason(status) == v1::CHUNK_CONFLICT &&
           status.message().find("statistics came after") != std::string_view::npos;
  }

  void Write(uint64_t seed) {
    std::mt19937_64 random(seed);
    bool resumed = false;
    uint64_t session = shard_->OpenSession("writer", 0, {}, &resumed).value();
    for (int round = 0; round < kRounds || !SeenAll(); ++round) {
      if (!shard_->Heartbeat(session).ok()) {
        session = shard_->OpenSession("writer", 0, {}, &resumed).value();
      }
      const int64_t n = static_cast<int64_t>(random() % kNames);
      const std::string name = "s" + std::to_string(n);
      v1::OpenSequenceRequest request = OpenRequest(name, KvOf(n), kPrompt);
      request.set_max_decode_tokens(kDecode);
      request.mutable_index()->set_window_tokens(16);
      request.set_session_id(session);
      const absl::Status opened = shard_->OpenSequence(request).status();
      if (!Fine(opened)) {
        if (Reason(opened) == v1::SEQUENCE_EXISTS && random() % 2 == 0) {
          Fine(shard_->Release(Handle(name)));
        }
        continue;
      }
      if (random() % 8 == 0) continue;  // dies right here
      const absl::Status put =
          shard_.Put(name, KvOf(n), kPrompt, 1 + static_cast<int64_t>(random() % 90));
      if (IsLateStatistics(put) || !Fine(put)) continue;
      if (Fine(shard_.Seal(name).status())) ++ready_;
    }
    shard_->CloseSession(session, true);
    --writers_;
  }

  void Compare(const TestKv& kv, int64_t layer, const SelectAnswer& answer) {
    const size_t bytes = static_cast<size_t>(kv.row_bytes()) / kv.shape.kv_heads();
    const TestKv::Layer& rows = kv.layers[static_cast<size_t>(layer)];
    for (size_t head = 0; head < answer.recalls.size(); ++head) {
      const HeadRecall& recall = answer.recalls[head];
      for (size_t i = 0; i < recall.positions.size(); ++i) {
        const size_t at = static_cast<size_t>(recall.positions[i] * kv.row_bytes()) + head * bytes;
        const char* record = reinterpret_cast<const char*>(recall.records[i]);
        ASSERT_EQ(std::memcmp(record, rows.keys.data() + at, bytes), 0);
        ASSERT_EQ(std::memcmp(record + bytes, rows.values.data() + at, bytes), 0);
        ++records_;
      }
      for (float value : answer.heads[head].state_output) ASSERT_TRUE(std::isfinite(value));
    }
  }

  void Decode(uint64_t seed) {
    std::mt19937_64 random(seed);
    for (int round = 0; round < kRounds || writers_ > 0; ++round) {
      const int64_t n = static_cast<int64_t>(random() % kNames);
      const std::string name = "s" + std::to_string(n);
      const TestKv& kv = KvOf(n);
      v1::AttachRequest attach;
      *attach.mutable_sequence() = Handle(name);
      attach.mutable_hot_cache()->set_capacity_tokens(64);
      const auto attached = shard_->Attach(attach);
      if (!Fine(attached.status())) {
        absl::SleepFor(absl::Microseconds(200));
        continue;
      }
      for (uint64_t step = 0; step < 12; ++step) {
        std::vector<SelectCall> calls(2);
        for (int64_t layer = 0; layer < 2; ++layer) {
          SelectCall& call = calls[static_cast<size_t>(layer)];
          call.attachment_id = attached->attachment_id();
          call.layer = layer;
          call.queries = MakeQueries(kv.shape, random());
          call.recall = true;
          call.step = step;
        }
        const SelectBatchAnswer batch = shard_.Select(std::move(calls), {}, random() % 2 == 0);
        for (const SelectAnswer& item : batch.items) {
          if (!Fine(item.status)) continue;
          Compare(kv, item.layer, item);
          ++steps_;
        }
        // Two decoders may append the same token: the bytes are the same.
        const auto now = shard_->GetSequence(attached->sequence().handle());
        if (!Fine(now.status())) break;
        if (now->tokens() < kPrompt + kDecode) {
          v1::AppendKvRequest append = AppendRequest(name, kv, now->tokens(), 1);
          *append.mutable_sequence() = attached->sequence().handle();
          Fine(shard_->Append(append).status());
        }
        Fine(shard_->GetSteadyZone(attached->sequence().handle(), 0).status());
      }
      if (random() % 4 != 0) Fine(shard_->Detach(attached->attachment_id()));
    }
  }

  void Operate(uint64_t seed) {
    std::mt19937_64 random(seed);
    for (int round = 0; round < 2 * kRounds || writers_ > 0; ++round) {
      const std::string name = "s" + std::to_string(random() % kNames);
      switch (random() % 6) {
        case 0:
          Fine(shard_->Release(Handle(name)));
          break;
        case 1:
          Fine(shard_->Evict(Handle(name), random() % 2 == 0));
          break;
        case 2: {
          v1::ForkSequenceRequest fork;
          *fork.mutable_source() = Handle(name);
          fork.set_name("fork");
          fork.set_max_decode_tokens(5);
          if (Fine(shard_->Fork(fork).status())) Fine(shard_->Release(Handle("fork")));
          break;
        }
        case 3:
          shard_.ExpectLedger(/*checksums=*/true);
          break;
        case 4:
          shard_->ListSequences("", "", 10);
          shard_->GetStats();
          break;
        default: {
          v1::GetIndexRequest index;
          *index.mutable_sequence() = Handle(name);
          index.set_want_centroids(true);
          Fine(shard_->GetIndex(index).status());
        }
      }
      absl::SleepFor(absl::Microseconds(300));
    }
  }

  static constexpr int kRounds = 400;
  static constexpr int64_t kArenaPages = 700;
  const uint64_t seed_;
  const absl::Time limit_ = absl::Now() + absl::Minutes(2);
  std::atomic<int> writers_{2};
  ShardHarness shard_{Options()};
  std::atomic<int64_t> ready_{0}, steps_{0}, records_{0}, errors_{0};
};

TEST(ShardStressTest, EverythingAtOnceIsRightOrATypedError) { Stress(TestSeed(20240607)).Run(); }

}  // namespace
}  // namespace clusterkv::cache_service
