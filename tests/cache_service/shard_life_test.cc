// Who lives how long: names and generations, leases, sessions, eviction, admission, drain.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <mutex>
#include <thread>

#include "absl/time/clock.h"
#include "tests/cache_service/shard_harness.h"

namespace clusterkv::cache_service {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using Notice = v1::SessionResponse::Notice;

constexpr int64_t kPrompt = 300;

bool Eventually(const std::function<bool()>& condition) {
  const absl::Time deadline = absl::Now() + absl::Seconds(20);
  while (absl::Now() < deadline) {
    if (condition()) return true;
    absl::SleepFor(absl::Milliseconds(2));
  }
  return false;
}

v1::SequenceHandle HandleOf(const std::string& name, uint64_t generation, uint64_t boot_id = 0) {
  v1::SequenceHandle handle = Handle(name);
  handle.set_generation(generation);
  handle.set_boot_id(boot_id);
  return handle;
}

const TestKv& Kv() {
  static const TestKv& kv = *new TestKv(MakeKv(TestShape(), kPrompt, 1));
  return kv;
}

// --- names and generations

TEST(ShardNamesTest, StaleHandlesAreErrorsAndNeverOtherData) {
  ShardHarness shard;
  const v1::Sequence first = shard.Ready(OpenRequest("a", Kv(), kPrompt), Kv());
  EXPECT_EQ(Reason(shard->OpenSequence(OpenRequest("a", Kv(), kPrompt)).status()),
            v1::SEQUENCE_EXISTS);
  EXPECT_TRUE(shard->GetSequence(first.handle()).ok());
  ASSERT_TRUE(shard->Release(first.handle()).ok());
  EXPECT_EQ(Reason(shard->GetSequence(first.handle()).status()), v1::SEQUENCE_NOT_FOUND);
  const v1::Sequence second = shard->OpenSequence(OpenRequest("a", Kv(), kPrompt)).value();
  EXPECT_GT(second.handle().generation(), first.handle().generation());
  const absl::Status stale = shard->GetSequence(first.handle()).status();
  EXPECT_EQ(Reason(stale), v1::STALE_GENERATION);
  EXPECT_EQ(Metadata(stale, "expected"), std::to_string(second.handle().generation()));
  EXPECT_EQ(Reason(shard->GetSequence(HandleOf("a", 0, shard->boot_id() + 1)).status()),
            v1::STALE_BOOT_ID);
  EXPECT_EQ(Reason(shard->GetSequence(HandleOf("", 0)).status()), v1::INVALID_FIELD);
  EXPECT_TRUE(shard->Release(first.handle()).ok()) << "what is not there is released";
  EXPECT_TRUE(shard->GetSequence(second.handle()).ok());
}

TEST(ShardNamesTest, ServersHaveBootIdsOfTheirOwn) {
  ShardHarness one, two;
  EXPECT_NE(one->boot_id(), 0u);
  EXPECT_NE(one->boot_id(), two->boot_id());
}

TEST(ShardNamesTest, ListsByNameInPages) {
  ShardHarness shard;
  for (const char* name : {"b/2", "a", "b/1", "c", "b/3"}) {
    ASSERT_TRUE(shard->OpenSequence(OpenRequest(name, Kv(), 20)).ok());
  }
  const auto names = [&](std::string_view prefix, std::string_view after, int64_t limit) {
    std::vector<std::string> listed;
    for (const v1::Sequence& sequence : shard->ListSequences(prefix, after, limit)) {
      listed.push_back(sequence.handle().name());
    }
    return listed;
  };
  EXPECT_THAT(names("", "", 100), ElementsAre("a", "b/1", "b/2", "b/3", "c"));
  EXPECT_THAT(names("b/", "", 2), ElementsAre("b/1", "b/2"));
  EXPECT_THAT(names("b/", "b/2", 2), ElementsAre("b/3"));
  EXPECT_THAT(names("", "b/3", 100), ElementsAre("c"));
  EXPECT_THAT(names("x", "", 100), ElementsAre());
}

// --- memory

// Pages that one READY sequence of OpenRequest holds.
int64_t PagesOfOne() {
  ShardHarness shard;
  const v1::Sequence sequence = shard.Ready(OpenRequest("a", Kv(), kPrompt), Kv());
  return static_cast<int64_t>(sequence.bytes()) / shard->page_bytes();
}
// Pages that opening one takes, staging included.
int64_t PagesToOpen() {
  ShardHarness shard;
  shard->OpenSequence(OpenRequest("a", Kv(), kPrompt)).value();
  return static_cast<int64_t>(shard->GetStats().reserved_pages());
}

ShardOptions RoomFor(int64_t pages) {
  ShardOptions options = TestOptions();
  options.arena_bytes = pages * options.page_bytes;
  return options;
}

TEST(ShardMemoryTest, WhatWasReservedIsWhatIsNeeded) {
  const int64_t need = PagesToOpen();
  ShardHarness exact(RoomFor(need));
  EXPECT_EQ(exact.Ready(OpenRequest("a", Kv(), kPrompt), Kv()).state(), v1::SEQUENCE_STATE_READY);
  ShardHarness tight(RoomFor(need - 1));
  const absl::Status full = tight->OpenSequence(OpenRequest("a", Kv(), kPrompt)).status();
  EXPECT_EQ(Reason(full), v1::ARENA_FULL);
  EXPECT_EQ(Metadata(full, "neededPages"), std::to_string(need));
  EXPECT_EQ(Metadata(full, "totalPages"), std::to_string(need - 1));
}

TEST(ShardMemoryTest, DecodedTokensHaveTheirMemoryFromTheStart) {
  const TestKv kv = MakeKv(TestShape(), kPrompt + 400, 1);
  v1::OpenSequenceRequest request = OpenRequest("a", kv, kPrompt);
  request.set_max_decode_tokens(400);
  request.mutable_index()->set_window_tokens(48);
  int64_t need = 0;
  {
    ShardHarness shard;
    shard->OpenSequence(request).value();
    need = static_cast<int64_t>(shard->GetStats().reserved_pages());
  }
  ShardHarness shard(RoomFor(need));
  shard.Ready(request, kv);
  v1::AttachRequest attach;  // so that it is not evicted
  *attach.mutable_sequence() = Handle("a");
  ASSERT_TRUE(shard->Attach(attach).ok());
  // Somebody else takes whatever is free and not promised.
  for (int i = 0; shard->OpenSequence(OpenRequest("other" + std::to_string(i), kv, 20)).ok();) ++i;
  for (int64_t at = kPrompt; at < kPrompt + 400; ++at) {
    ASSERT_TRUE(shard->Append(AppendRequest("a", kv, at, 1)).ok()) << at;
    if (at % 48 == 0) shard.WaitIdle();
  }
}

TEST(ShardMemoryTest, LeastRecentlyUsedReadySequencesLeaveFirst) {
  const int64_t one = PagesOfOne(), open = PagesToOpen();
  ShardHarness shard(RoomFor(2 * one + open));
  for (const char* name : {"a", "b", "c"}) shard.Ready(OpenRequest(name, Kv(), kPrompt), Kv());
  ASSERT_TRUE(shard.SelectOne("a", 0, MakeQueries(Kv().shape, 1)).status.ok());  // now b is oldest
  shard.Ready(OpenRequest("d", Kv(), kPrompt), Kv());
  EXPECT_EQ(Reason(shard->GetSequence(Handle("b")).status()), v1::SEQUENCE_NOT_FOUND);
  for (const char* name : {"a", "c", "d"}) EXPECT_TRUE(shard->GetSequence(Handle(name)).ok());
  EXPECT_EQ(shard->GetStats().evictions(), 1u);
}

TEST(ShardMemoryTest, OneOfAPrefixLeavesWithoutTheOneThatIsKept) {
  ShardHarness shard;
  for (const char* name : {"a/1", "b/1", "b/2", "b/3", "c/1"}) {
    shard.Ready(OpenRequest(name, Kv(), kPrompt), Kv());
  }
  ASSERT_TRUE(shard->OpenSequence(OpenRequest("b/filling", Kv(), kPrompt)).ok());
  EXPECT_THAT(shard->Evictable("b/"), ::testing::ElementsAre("b/1", "b/2", "b/3"));
  EXPECT_TRUE(shard->EvictOne("b/", "b/1"));
  EXPECT_THAT(shard->Evictable("b/"), ::testing::ElementsAre("b/1", "b/3"));
  EXPECT_TRUE(shard->EvictOne("b/", "b/1"));
  EXPECT_FALSE(shard->EvictOne("b/", "b/1"));
  EXPECT_EQ(shard->GetStats().evictions_by_reason().at("quota"), 2u);
  EXPECT_EQ(shard->Evictable("").size(), 3u);
}

TEST(ShardMemoryTest, WhatIsAttachedFillingOrPinnedIsNotEvicted) {
  const int64_t one = PagesOfOne(), open = PagesToOpen();
  ShardHarness shard(RoomFor(2 * one + open + open - 1));
  shard.Ready(OpenRequest("attached", Kv(), kPrompt), Kv());
  v1::AttachRequest attach;
  *attach.mutable_sequence() = Handle("attached");
  const uint64_t attachment = shard->Attach(attach).value().attachment_id();
  shard.Ready(OpenRequest("pinned", Kv(), kPrompt), Kv());
  v1::RecallClustersRequest recall;
  *recall.mutable_sequence() = Handle("pinned");
  recall.add_heads()->add_positions(20);
  auto pinned = std::make_unique<Shard::RecallAnswer>(shard->Recall(recall).value());
  ASSERT_TRUE(shard->OpenSequence(OpenRequest("filling", Kv(), kPrompt)).ok());

  const auto open_another = [&] {
    return Reason(shard->OpenSequence(OpenRequest("new", Kv(), kPrompt)).status());
  };
  EXPECT_EQ(open_another(), v1::ARENA_FULL);
  EXPECT_EQ(shard->GetStats().evictions(), 0u) << "nobody leaves for what does not fit anyway";
  pinned.reset();
  EXPECT_EQ(open_another(), v1::ERROR_REASON_UNSPECIFIED);
  EXPECT_EQ(Reason(shard->GetSequence(Handle("pinned")).status()), v1::SEQUENCE_NOT_FOUND);
  ASSERT_TRUE(shard->Release(Handle("new")).ok());
  ASSERT_TRUE(shard->OpenSequence(OpenRequest("rest", Kv(), kPrompt)).ok());
  EXPECT_EQ(open_another(), v1::ARENA_FULL);
  ASSERT_TRUE(shard->Detach(attachment).ok());
  EXPECT_EQ(open_another(), v1::ERROR_REASON_UNSPECIFIED);
}

TEST(ShardMemoryTest, StagingBeyondTwoLayersIsLimitedByName) {
  const TestKv kv = MakeKv(TestShape(6), kPrompt, 1);
  int64_t need = 0;
  {
    ShardHarness shard;
    shard->OpenSequence(OpenRequest("a", kv, kPrompt)).value();
    need = static_cast<int64_t>(shard->GetStats().reserved_pages());
  }
  ShardHarness shard(RoomFor(need));
  ASSERT_TRUE(shard->OpenSequence(OpenRequest("a", kv, kPrompt)).ok());
  ASSERT_TRUE(shard->PutChunk(Handle("a"), kv.Chunk(0, 0, 10)).ok());
  ASSERT_TRUE(shard->PutChunk(Handle("a"), kv.Chunk(1, 0, 10)).ok());
  const absl::Status third = shard->PutChunk(Handle("a"), kv.Chunk(2, 0, 10));
  EXPECT_EQ(Reason(third), v1::LIMIT_EXCEEDED);
  EXPECT_EQ(Metadata(third, "limit"), "staging");
  // The layers that have their staging go on, and make room.
  ASSERT_TRUE(shard->PutChunk(Handle("a"), kv.Chunk(0, 10, kPrompt - 10)).ok());
  shard.WaitIdle();
  EXPECT_TRUE(shard->PutChunk(Handle("a"), kv.Chunk(2, 0, 10)).ok());
}

TEST(ShardMemoryTest, WhoLeavesReadyLeavesAllMemoryAtOnce) {
  const TestKv kv = MakeKv(TestShape(6), kPrompt, 1);
  ShardHarness shard;
  for (int round = 0; round < 20; ++round) {
    shard.Ready(OpenRequest("a", kv, kPrompt), kv);
    ASSERT_TRUE(shard->Release(Handle("a")).ok());
    const v1::Stats stats = shard->GetStats();
    ASSERT_EQ(stats.pages().free(), stats.pages().total()) << "what built its layers holds none";
    ASSERT_EQ(stats.reserved_pages(), 0u);
  }
}

TEST(ShardMemoryTest, LimitsHaveNames) {
  ShardOptions options = TestOptions();
  options.max_sequences = 2;
  options.max_attachments = 1;
  options.max_sequence_tokens = 1000;
  options.residency_bytes = 1 << 20;
  ShardHarness shard(options);
  const auto limit = [](const absl::Status& status) {
    EXPECT_EQ(Reason(status), v1::LIMIT_EXCEEDED) << status;
    return Metadata(status, "limit");
  };
  v1::OpenSequenceRequest request = OpenRequest("a", Kv(), kPrompt);
  request.set_max_decode_tokens(701);
  EXPECT_EQ(limit(shard->OpenSequence(request).status()), "max_sequence_tokens");
  shard.Ready(OpenRequest("a", Kv(), kPrompt), Kv());
  v1::AttachRequest attach;
  *attach.mutable_sequence() = Handle("a");
  attach.mutable_hot_cache()->set_capacity_tokens(1 << 20);
  EXPECT_EQ(limit(shard->Attach(attach).status()), "residency_bytes");
  attach.clear_hot_cache();
  ASSERT_TRUE(shard->Attach(attach).ok());
  EXPECT_EQ(limit(shard->Attach(attach).status()), "max_attachments");
  ASSERT_TRUE(shard->OpenSequence(OpenRequest("b", Kv(), 20)).ok());
  EXPECT_EQ(limit(shard->OpenSequence(OpenRequest("c", Kv(), 20)).status()), "max_sequences");
}

TEST(ShardMemoryTest, ResidencyIsCountedLayerByLayerAndGivenBack) {
  ShardOptions options = TestOptions();
  options.residency_bytes = 150 << 10;
  ShardHarness shard(options);
  shard.Ready(OpenRequest("a", Kv(), kPrompt), Kv());
  v1::AttachRequest attach;
  *attach.mutable_sequence() = Handle("a");
  attach.mutable_hot_cache()->set_capacity_tokens(1024);  // about 50 KiB per KV head
  for (int round = 0; round < 3; ++round) {
    const uint64_t attachment = shard->Attach(attach).value().attachment_id();
    std::vector<SelectCall> calls(2);
    for (int64_t layer = 0; layer < 2; ++layer) {
      calls[static_cast<size_t>(layer)].attachment_id = attachment;
      calls[static_cast<size_t>(layer)].layer = layer;
      calls[static_cast<size_t>(layer)].recall = true;
      calls[static_cast<size_t>(layer)].queries = MakeQueries(Kv().shape, 1);
    }
    SelectBatchAnswer batch = shard.Select(std::move(calls));
    int refused = 0;
    for (const SelectAnswer& item : batch.items) {
      if (item.status.ok()) continue;
      ++refused;
      EXPECT_EQ(Reason(item.status), v1::LIMIT_EXCEEDED);
      EXPECT_EQ(Metadata(item.status, "limit"), "residency_bytes");
    }
    EXPECT_LE(refused, 1) << "the first layer fits";
    batch = SelectBatchAnswer();
    ASSERT_TRUE(shard->Detach(attachment).ok());
  }
}

TEST(ShardMemoryTest, FullQueuesAreRefused) {
  ShardOptions options = TestOptions();
  options.max_queued_selects = 3;
  ShardHarness shard(options);
  shard.Ready(OpenRequest("a", Kv(), kPrompt), Kv());
  std::vector<SelectCall> calls(4);
  for (SelectCall& call : calls) {
    call.sequence = Handle("a");
    call.queries = MakeQueries(Kv().shape, 1);
  }
  const SelectBatchAnswer refused = shard.Select(calls);
  for (const SelectAnswer& item : refused.items) {
    EXPECT_EQ(Reason(item.status), v1::LIMIT_EXCEEDED);
    EXPECT_EQ(Metadata(item.status, "limit"), "max_queued_selects");
  }
  calls.pop_back();
  EXPECT_TRUE(shard.Select(calls).items[0].status.ok());
}

TEST(ShardSelectQueueTest, DeadlinesAndCancellationReachQueuedItems) {
  ShardHarness shard;
  shard.Ready(OpenRequest("a", Kv(), kPrompt), Kv());
  std::vector<SelectCall> calls(2);
  for (SelectCall& call : calls) {
    call.sequence = Handle("a");
    call.queries = MakeQueries(Kv().shape, 1);
  }
  CallContext late;
  late.deadline = absl::Now() - absl::Milliseconds(1);
  for (const SelectAnswer& item : shard.Select(calls, late).items) {
    EXPECT_EQ(Reason(item.status), v1::QUEUE_DEADLINE);
  }
  CallContext leaves;  // between queueing and start
  auto asked = std::make_shared<std::atomic<int>>(0);
  leaves.is_cancelled = [asked] { return asked->fetch_add(1) > 0; };
  for (const SelectAnswer& item : shard.Select(calls, leaves).items) {
    EXPECT_EQ(Reason(item.status), v1::CANCELLED_BY_CLIENT);
  }
}

TEST(ShardEvictTest, OperatorsEvictByHand) {
  ShardHarness shard;
  shard.Ready(OpenRequest("a", Kv(), kPrompt), Kv());
  v1::AttachRequest attach;
  *attach.mutable_sequence() = Handle("a");
  const uint64_t attachment = shard->Attach(attach).value().attachment_id();
  EXPECT_EQ(Reason(shard->Evict(Handle("b"), false)), v1::SEQUENCE_NOT_FOUND);
  EXPECT_EQ(Reason(shard->Evict(Handle("a"), false)), v1::SEQUENCE_NOT_READY);
  EXPECT_TRUE(shard->Evict(Handle("a"), true).ok());
  EXPECT_EQ(Reason(shard->Detach(attachment)), v1::ATTACHMENT_NOT_FOUND) << "it went along";
  EXPECT_EQ(shard->GetStats().pages().free(), shard->GetStats().pages().total());
}

// --- leases and sessions

struct Events {
  std::mutex mutex;
  std::vector<Notice::Kind> notices;
  std::atomic<int> expired{0};

  Shard::SessionEvents Make(const std::shared_ptr<Events>& self) {
    return {[self](const Notice& notice) {
              const std::lock_guard<std::mutex> lock(self->mutex);
              self->notices.push_back(notice.kind());
            },
            [self] { self->expired.fetch_add(1); }};
  }
  std::vector<Notice::Kind> Notices() {
    const std::lock_guard<std::mutex> lock(mutex);
    return notices;
  }
};

class ShardSessionTest : public ::testing::Test {
 protected:
  static ShardOptions Options() {
    ShardOptions options = TestOptions();
    // Long enough that a busy machine does not miss a beat.
    options.session_ttl = absl::Milliseconds(1500);
    options.attachment_ttl = absl::Milliseconds(1500);
    return options;
  }
  uint64_t Open(uint64_t resume_id = 0, bool* resumed = nullptr) {
    bool ignored = false;
    return shard_
        ->OpenSession("w", resume_id, events_->Make(events_),
                      resumed != nullptr ? resumed : &ignored)
        .value();
  }
  bool Lives(const std::string& name) { return shard_->GetSequence(Handle(name)).ok(); }

  std::shared_ptr<Events> events_ = std::make_shared<Events>();
  ShardHarness shard_{Options()};
};

TEST_F(ShardSessionTest, SilentSessionsExpireAndTakeTheirFillingSequencesAlong) {
  const uint64_t session = Open();
  v1::OpenSequenceRequest request = OpenRequest("filling", Kv(), kPrompt);
  request.set_session_id(session);
  ASSERT_TRUE(shard_->OpenSequence(request).ok());
  request.set_name("ready");
  shard_.Ready(request, Kv());
  v1::AttachRequest attach;
  *attach.mutable_sequence() = Handle("ready");
  attach.set_session_id(session);
  const uint64_t attachment = shard_->Attach(attach).value().attachment_id();
  for (int beat = 0; beat < 10; ++beat) {
    absl::SleepFor(absl::Milliseconds(300));
    ASSERT_TRUE(shard_->Heartbeat(session).ok());
  }
  EXPECT_TRUE(Lives("filling")) << "twice the ttl, but it beats";
  EXPECT_TRUE(Eventually([&] { return events_->expired.load() == 1; }));
  EXPECT_TRUE(Eventually([&] { return !Lives("filling"); }));
  EXPECT_TRUE(Lives("ready"));
  EXPECT_EQ(Reason(shard_->Heartbeat(session)), v1::SESSION_NOT_FOUND);
  EXPECT_TRUE(
      Eventually([&] { return Reason(shard_->Detach(attachment)) == v1::ATTACHMENT_NOT_FOUND; }));
  EXPECT_EQ(shard_->GetStats().sessions(), 0u);
}

TEST_F(ShardSessionTest, BrokenStreamsResumeWithinTheTtl) {
  const uint64_t session = Open();
  v1::OpenSequenceRequest request = OpenRequest("filling", Kv(), kPrompt);
  request.set_session_id(session);
  ASSERT_TRUE(shard_->OpenSequence(request).ok());
  shard_->CloseSession(session, /*now=*/false);
  EXPECT_EQ(Reason(shard_->Heartbeat(session)), v1::SESSION_NOT_FOUND) << "no stream, no beat";
  bool resumed = false;
  EXPECT_EQ(Open(session, &resumed), session);
  EXPECT_TRUE(resumed);
  EXPECT_TRUE(shard_->Heartbeat(session).ok());
  EXPECT_TRUE(Lives("filling"));
  shard_->CloseSession(session, false);
  EXPECT_TRUE(Eventually([&] { return !Lives("filling"); }));
  EXPECT_NE(Open(session, &resumed), session);
  EXPECT_FALSE(resumed);
  EXPECT_EQ(events_->expired.load(), 0) << "there was no stream to tell";
}

TEST_F(ShardSessionTest, LateEndOfTheOldStreamDoesNotBreakAResumedSession) {
  const uint64_t session = Open();
  bool resumed = false;
  EXPECT_EQ(Open(session, &resumed), session);
  EXPECT_TRUE(resumed);
  shard_->CloseSession(session, /*now=*/false);  // the old stream's
  EXPECT_TRUE(shard_->Heartbeat(session).ok());
  shard_->StartDrain();
  EXPECT_THAT(events_->Notices(), ElementsAre(Notice::DRAINING)) << "the new stream is told";
  shard_->CloseSession(session, /*now=*/false);
  EXPECT_EQ(Reason(shard_->Heartbeat(session)), v1::SESSION_NOT_FOUND);
}

TEST_F(ShardSessionTest, SessionsEndAtOnceWhenTold) {
  const uint64_t session = Open();
  v1::OpenSequenceRequest request = OpenRequest("filling", Kv(), kPrompt);
  request.set_session_id(session);
  ASSERT_TRUE(shard_->OpenSequence(request).ok());
  shard_->CloseSession(session, /*now=*/true);
  EXPECT_FALSE(Lives("filling"));
  EXPECT_EQ(events_->expired.load(), 1);
  request.set_name("late");
  EXPECT_EQ(Reason(shard_->OpenSequence(request).status()), v1::SESSION_NOT_FOUND);
}

TEST_F(ShardSessionTest, OwnersAndWorkersAreToldOfWhatTheyLose) {
  const uint64_t session = Open();
  v1::OpenSequenceRequest request = OpenRequest("a", Kv(), kPrompt);
  request.set_session_id(session);
  shard_.Ready(request, Kv());
  v1::AttachRequest attach;
  *attach.mutable_sequence() = Handle("a");
  attach.set_session_id(session);
  ASSERT_TRUE(shard_->Attach(attach).ok());
  ASSERT_TRUE(shard_->Evict(Handle("a"), true).ok());
  EXPECT_THAT(events_->Notices(), ElementsAre(Notice::ATTACHMENT_LOST, Notice::SEQUENCE_EVICTED));
  shard_->StartDrain();
  EXPECT_THAT(events_->Notices(), Contains(Notice::DRAINING));
}

TEST_F(ShardSessionTest, UnusedAttachmentsWithoutSessionExpire) {
  shard_.Ready(OpenRequest("a", Kv(), kPrompt), Kv());
  v1::AttachRequest attach;
  *attach.mutable_sequence() = Handle("a");
  ASSERT_TRUE(shard_->Attach(attach).ok());
  EXPECT_EQ(shard_->GetStats().attachments(), 1u);
  EXPECT_TRUE(Eventually([&] { return shard_->GetStats().attachments() == 0; }));
  EXPECT_TRUE(Lives("a"));
}

TEST_F(ShardSessionTest, SequencesLiveByTheirTtlWithoutOwner) {
  v1::OpenSequenceRequest request = OpenRequest("mortal", Kv(), kPrompt);
  request.set_ttl_ms(1000);
  shard_.Ready(request, Kv());
  request.set_name("immortal");
  request.set_ttl_ms(0);
  shard_.Ready(request, Kv());
  EXPECT_TRUE(Eventually([&] {
    return shard_->ListSequences("mortal", "", 1).empty();  // looking is no use of it
  }));
  EXPECT_TRUE(Lives("immortal"));
}

// --- drain

TEST(ShardDrainTest, NoNewWorkIsTakenAndOldWorkGoesOn) {
  ShardHarness shard;
  shard.Ready(OpenRequest("a", Kv(), kPrompt), Kv());
  ASSERT_TRUE(shard->OpenSequence(OpenRequest("filling", Kv(), kPrompt)).ok());
  bool resumed = false;
  const uint64_t session = shard->OpenSession("w", 0, {}, &resumed).value();
  shard->StartDrain();
  shard->StartDrain();
  EXPECT_TRUE(shard->draining());
  EXPECT_EQ(Reason(shard->OpenSequence(OpenRequest("b", Kv(), 20)).status()), v1::DRAINING);
  v1::AttachRequest attach;
  *attach.mutable_sequence() = Handle("a");
  EXPECT_EQ(Reason(shard->Attach(attach).status()), v1::DRAINING);
  v1::ForkSequenceRequest fork;
  *fork.mutable_source() = Handle("a");
  fork.set_name("b");
  EXPECT_EQ(Reason(shard->Fork(fork).status()), v1::DRAINING);
  EXPECT_EQ(Reason(shard->OpenSession("w", 0, {}, &resumed).status()), v1::DRAINING);
  EXPECT_TRUE(shard->OpenSession("w", session, {}, &resumed).ok()) << "resuming is no new work";
  EXPECT_TRUE(shard.SelectOne("a", 0, MakeQueries(Kv().shape, 1)).status.ok());
  EXPECT_TRUE(shard.Put("filling", Kv(), kPrompt).ok());
  EXPECT_TRUE(shard.Seal("filling").ok());
  EXPECT_TRUE(shard->GetStats().draining());
}

TEST(ShardStatsTest, CountsWhatHappened) {
  ShardHarness shard;
  shard.Ready(OpenRequest("a", Kv(), kPrompt), Kv());
  v1::AttachRequest attach;
  *attach.mutable_sequence() = Handle("a");
  attach.mutable_hot_cache()->set_capacity_tokens(256);
  attach.add_links(v1::LINK_PEER);
  const uint64_t attachment = shard->Attach(attach).value().attachment_id();
  for (uint64_t step = 0; step < 2; ++step) {
    std::vector<SelectCall> calls(1);
    calls[0].attachment_id = attachment;
    calls[0].recall = true;
    calls[0].step = step;
    calls[0].queries = MakeQueries(Kv().shape, 1);
    ASSERT_TRUE(shard.Select(std::move(calls)).items[0].status.ok());
  }
  shard->CountError(v1::CHUNK_CONFLICT);
  shard.WaitIdle();
  const v1::Stats stats = shard->GetStats();
  EXPECT_EQ(stats.selects(), 2u);
  EXPECT_EQ(stats.misses(), 48u);
  EXPECT_EQ(stats.hits(), 48u);
  EXPECT_EQ(stats.recalled_tokens(), 48u);
  EXPECT_EQ(stats.recalled_bytes(), 48u * 128u);
  EXPECT_EQ(stats.state_bytes(), 2u * 4u * (2u * 32u + 4u));
  EXPECT_EQ(stats.ingested_bytes(), 2u * 2u * kPrompt * 128u);
  EXPECT_EQ(stats.errors().at("CHUNK_CONFLICT"), 1u);
  EXPECT_EQ(stats.link_fallbacks().at("NOT_BUILT_IN"), 1u);
  EXPECT_EQ(stats.sequences(), 1u);
  EXPECT_EQ(stats.attachments(), 1u);
  EXPECT_GT(stats.resident_bytes(), 0u);
  EXPECT_GE(stats.select_p99_us(), stats.select_p50_us());
  EXPECT_EQ(stats.queued_selects(), 0u);
}

}  // namespace
}  // namespace clusterkv::cache_service
