#include "worker/layer_cache.h"

#include <gtest/gtest.h>
#include <xxhash.h>

#include <cstring>
#include <string>
#include <vector>

#include "proto/error.h"

namespace clusterkv::worker {
namespace {

constexpr int64_t kRecordBytes = 64;  // of head_dim 16, bf16

LayerCache MakeCache(int64_t capacity) {
  auto cache = LayerCache::Create(2, {kernels::HotCachePolicy::kTokenLru, capacity, 4, 1},
                                  kernels::FindRecordCodec("raw"), kRecordBytes);
  EXPECT_TRUE(cache.ok()) << cache.status();
  return std::move(cache).value();
}

v1::SelectResult Selection(const std::vector<std::vector<uint32_t>>& heads) {
  v1::SelectResult result;
  for (const auto& positions : heads) {
    v1::HeadSelection& head = *result.add_heads();
    for (const uint32_t position : positions) head.add_exact_positions(position);
  }
  return result;
}

std::string Record(uint32_t head, uint32_t position) {
  std::string record = std::to_string(head) + ":" + std::to_string(position);
  record.resize(kRecordBytes, '#');
  return record;
}

v1::RecordChunk Records(uint32_t head, const std::vector<uint32_t>& positions) {
  v1::RecordChunk chunk;
  chunk.set_kv_head(head);
  for (const uint32_t position : positions) {
    chunk.add_positions(position);
    chunk.mutable_records()->append(Record(head, position));
  }
  chunk.set_checksum(XXH3_64bits(chunk.records().data(), chunk.records().size()));
  return chunk;
}

// The records of the step, in order of position, as attention would read them.
std::string Held(const LayerCache& cache, int64_t head) {
  const kernels::RecordRun run = cache.Run(head);
  std::string held;
  for (const int32_t slot : run.slots) {
    held.append(reinterpret_cast<const char*>(run.slot_base + slot * kRecordBytes), kRecordBytes);
  }
  return held;
}

TEST(LayerCacheTest, HoldsWhatWasRecalledBefore) {
  LayerCache cache = MakeCache(8);
  ASSERT_TRUE(cache.Begin(Selection({{20, 30}, {40}}), 16, 100).ok());
  EXPECT_EQ(cache.misses(), 3);
  ASSERT_TRUE(cache.Receive(Records(0, {20})).ok());
  ASSERT_TRUE(cache.Receive(Records(0, {30})).ok());
  EXPECT_EQ(ReasonOf(cache.Complete()), v1::CHECKSUM_MISMATCH);
  ASSERT_TRUE(cache.Receive(Records(1, {40})).ok());
  ASSERT_TRUE(cache.Complete().ok());
  ASSERT_TRUE(cache.Begin(Selection({{20, 25, 30}, {}}), 16, 100).ok());
  EXPECT_EQ(cache.misses(), 1);
  EXPECT_EQ(cache.hits(), 2);
  ASSERT_TRUE(cache.Receive(Records(0, {25})).ok());
  ASSERT_TRUE(cache.Complete().ok());
  EXPECT_EQ(Held(cache, 0), Record(0, 20) + Record(0, 25) + Record(0, 30));
  EXPECT_EQ(Held(cache, 1), "");
  EXPECT_EQ(cache.held_bytes(), 4 * kRecordBytes);
  std::string missed;
  cache.ForEachMiss([&](const std::byte* record) {
    missed.append(reinterpret_cast<const char*>(record), kRecordBytes);
  });
  EXPECT_EQ(missed, Record(0, 25));
}

TEST(LayerCacheTest, RefusesRecordsThatAreNotTheMisses) {
  LayerCache cache = MakeCache(8);
  ASSERT_TRUE(cache.Begin(Selection({{20, 30}, {40}}), 16, 100).ok());
  EXPECT_EQ(ReasonOf(cache.Receive(Records(0, {30}))), v1::CHECKSUM_MISMATCH);
  EXPECT_EQ(ReasonOf(cache.Receive(Records(1, {20}))), v1::CHECKSUM_MISMATCH);
  EXPECT_EQ(ReasonOf(cache.Receive(Records(2, {20}))), v1::CHECKSUM_MISMATCH);
  v1::RecordChunk corrupted = Records(0, {20});
  (*corrupted.mutable_records())[0] ^= 1;
  EXPECT_EQ(ReasonOf(cache.Receive(corrupted)), v1::CHECKSUM_MISMATCH);
  v1::RecordChunk shorter = Records(0, {20});
  shorter.mutable_records()->resize(kRecordBytes - 1);
  shorter.set_checksum(XXH3_64bits(shorter.records().data(), shorter.records().size()));
  EXPECT_EQ(ReasonOf(cache.Receive(shorter)), v1::CHECKSUM_MISMATCH);
  ASSERT_TRUE(cache.Receive(Records(0, {20, 30})).ok());
  EXPECT_EQ(ReasonOf(cache.Receive(Records(0, {30}))), v1::CHECKSUM_MISMATCH);
}

TEST(LayerCacheTest, RecordsByLinkAreToBeHadElsewhere) {
  LayerCache cache = MakeCache(8);
  ASSERT_TRUE(cache.Begin(Selection({{20, 30}, {40}}), 16, 100).ok());
  v1::RecordChunk by_link;
  by_link.add_positions(20);
  by_link.add_positions(30);
  by_link.set_by_link(true);
  v1::RecordChunk with_bytes = by_link;
  with_bytes.set_records(Record(0, 20) + Record(0, 30));
  EXPECT_EQ(ReasonOf(cache.Receive(with_bytes)), v1::CHECKSUM_MISMATCH);
  ASSERT_TRUE(cache.Receive(by_link).ok());
  ASSERT_TRUE(cache.Receive(Records(1, {40})).ok());
  ASSERT_TRUE(cache.Complete().ok());
  ASSERT_EQ(cache.linked().size(), 2u);
  for (size_t i = 0; i < 2; ++i) {
    const LinkedRecord& record = cache.linked()[i];
    EXPECT_EQ(record.kv_head, 0);
    EXPECT_LT(record.slot, cache.slot_count());
    std::memcpy(record.copy, Record(0, i == 0 ? 20 : 30).data(), kRecordBytes);
  }
  EXPECT_EQ(Held(cache, 0), Record(0, 20) + Record(0, 30));
  EXPECT_EQ(Held(cache, 1), Record(1, 40));
  // Hits name none.
  ASSERT_TRUE(cache.Begin(Selection({{20, 30}, {40}}), 16, 100).ok());
  EXPECT_TRUE(cache.linked().empty());
}

TEST(LayerCacheTest, RefusesSelectionsThatNoServiceMayAnswer) {
  LayerCache cache = MakeCache(8);
  const auto refused = [&](const v1::SelectResult& result) {
    return ReasonOf(cache.Begin(result, 16, 100)) == v1::INTERNAL_ERROR;
  };
  EXPECT_TRUE(refused(Selection({{20}})));
  EXPECT_TRUE(refused(Selection({{20, 20}, {}})));
  EXPECT_TRUE(refused(Selection({{30, 20}, {}})));
  EXPECT_TRUE(refused(Selection({{15}, {}})));
  EXPECT_TRUE(refused(Selection({{100}, {}})));
  EXPECT_TRUE(refused(Selection({{4'000'000'000u}, {}})));
  EXPECT_TRUE(refused(Selection({{20, 21, 22, 23, 24}, {}})));  // more than a step's
  v1::SelectResult masks = Selection({{20, 30}, {}});
  masks.mutable_heads(0)->add_head_masks(1);
  EXPECT_TRUE(refused(masks));
}

TEST(LayerCacheTest, ClearedCacheMissesEverything) {
  LayerCache cache = MakeCache(8);
  ASSERT_TRUE(cache.Begin(Selection({{20}, {}}), 16, 100).ok());
  ASSERT_TRUE(cache.Receive(Records(0, {20})).ok());
  cache.Clear();
  ASSERT_TRUE(cache.Begin(Selection({{20}, {}}), 16, 100).ok());
  EXPECT_EQ(cache.misses(), 1);
}

}  // namespace
}  // namespace clusterkv::worker
