#include "worker/steady_rows.h"

#include <gtest/gtest.h>
#include <xxhash.h>

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "proto/error.h"

namespace clusterkv::worker {
namespace {

constexpr int64_t kHeads = 2;
constexpr int64_t kRowBytes = 8;

// A token's K (or V) of a head, recognisable.
std::string Row(int64_t position, int64_t head, char kind) {
  std::string row = std::to_string(position * 10 + head) + kind;
  row.resize(kRowBytes, '.');
  return row;
}

v1::RecordChunk Chunk(int64_t head, const std::vector<uint32_t>& positions) {
  v1::RecordChunk chunk;
  chunk.set_kv_head(static_cast<uint32_t>(head));
  for (const uint32_t position : positions) {
    chunk.add_positions(position);
    chunk.mutable_records()->append(Row(position, head, 'k') + Row(position, head, 'v'));
  }
  chunk.set_checksum(XXH3_64bits(chunk.records().data(), chunk.records().size()));
  return chunk;
}

void AppendToken(SteadyRows& rows, int64_t position) {
  std::string key, value;
  for (int64_t h = 0; h < kHeads; ++h) {
    key += Row(position, h, 'k');
    value += Row(position, h, 'v');
  }
  const auto bytes = [](const std::string& text) {
    return absl::MakeConstSpan(reinterpret_cast<const std::byte*>(text.data()), text.size());
  };
  rows.Append(bytes(key), bytes(value));
}

void ExpectHolds(const SteadyRows& rows, const std::vector<int64_t>& positions) {
  for (int64_t h = 0; h < kHeads; ++h) {
    std::string held, expected;
    for (const kernels::RawRun& run : rows.Runs(h)) {
      for (int64_t i = 0; i < run.tokens; ++i) {
        held.append(reinterpret_cast<const char*>(run.keys + i * run.key_stride_bytes), kRowBytes);
        held.append(reinterpret_cast<const char*>(run.values + i * run.value_stride_bytes),
                    kRowBytes);
      }
    }
    for (const int64_t p : positions) expected += Row(p, h, 'k') + Row(p, h, 'v');
    ASSERT_EQ(held, expected) << "head " << h;
  }
  EXPECT_EQ(rows.held_bytes(), static_cast<int64_t>(positions.size()) * kHeads * 2 * kRowBytes);
}

std::vector<int64_t> Range(int64_t begin, int64_t end) {
  std::vector<int64_t> range;
  for (int64_t i = begin; i < end; ++i) range.push_back(i);
  return range;
}

TEST(SteadyRowsTest, TakesSinksAndWindowInChunks) {
  SteadyRows rows(kHeads, kRowBytes, 3, 100, 97);
  ASSERT_TRUE(rows.Add(Chunk(0, {0, 1})).ok());
  ASSERT_TRUE(rows.Add(Chunk(1, {0, 1, 2, 97, 98, 99})).ok());
  EXPECT_FALSE(rows.CheckComplete().ok());
  ASSERT_TRUE(rows.Add(Chunk(0, {2, 97, 98, 99})).ok());
  ASSERT_TRUE(rows.CheckComplete().ok());
  ExpectHolds(rows, {0, 1, 2, 97, 98, 99});
}

TEST(SteadyRowsTest, RefusesOtherRowsThanThoseMissing) {
  SteadyRows rows(kHeads, kRowBytes, 2, 100, 99);
  const auto refused = [&](const v1::RecordChunk& chunk) {
    return ReasonOf(rows.Add(chunk)) == v1::CHECKSUM_MISMATCH;
  };
  EXPECT_TRUE(refused(Chunk(2, {0})));
  EXPECT_TRUE(refused(Chunk(0, {1})));
  EXPECT_TRUE(refused(Chunk(0, {0, 1, 50})));
  EXPECT_TRUE(refused(Chunk(0, {0, 1, 99, 100})));
  v1::RecordChunk corrupted = Chunk(0, {0, 1, 99});
  (*corrupted.mutable_records())[7] ^= 1;
  EXPECT_TRUE(refused(corrupted));
  v1::RecordChunk truncated = Chunk(0, {0, 1, 99});
  truncated.mutable_records()->pop_back();
  truncated.set_checksum(XXH3_64bits(truncated.records().data(), truncated.records().size()));
  EXPECT_TRUE(refused(truncated));
  EXPECT_TRUE(rows.Add(Chunk(0, {0, 1, 99})).ok());
}

TEST(SteadyRowsTest, WindowMovesOverClusteredTokens) {
  for (const int64_t window_tokens : {1, 7, 64, 320}) {
    SteadyRows rows(kHeads, kRowBytes, 2, 10, 10);
    for (int64_t h = 0; h < kHeads; ++h) ASSERT_TRUE(rows.Add(Chunk(h, {0, 1})).ok());
    int64_t begin = 10;
    for (int64_t token = 10; token < 1000; ++token) {
      AppendToken(rows, token);
      if (token + 1 - begin == window_tokens && token % 3 == 0) begin = token + 1;
      ASSERT_TRUE(rows.MoveWindow(begin).ok());
      EXPECT_EQ(rows.window_begin(), begin);
      std::vector<int64_t> expected = {0, 1};
      for (int64_t p : Range(begin, token + 1)) expected.push_back(p);
      ExpectHolds(rows, expected);
      if (HasFatalFailure()) return;
    }
    EXPECT_FALSE(rows.MoveWindow(begin - 1).ok());
    EXPECT_FALSE(rows.MoveWindow(1001).ok());
  }
}

TEST(SteadyRowsTest, ShortPromptIsAllSinks) {
  SteadyRows rows(kHeads, kRowBytes, 2, 2, 2);
  for (int64_t h = 0; h < kHeads; ++h) ASSERT_TRUE(rows.Add(Chunk(h, {0, 1})).ok());
  ASSERT_TRUE(rows.CheckComplete().ok());
  for (int64_t token = 2; token < 7; ++token) {
    AppendToken(rows, token);
    ExpectHolds(rows, Range(0, token + 1));
  }
  ASSERT_TRUE(rows.MoveWindow(6).ok());
  ExpectHolds(rows, {0, 1, 6});
}

TEST(SteadyRowsTest, NothingHeldIsNoRun) {
  const SteadyRows rows(kHeads, kRowBytes, 0, 5, 5);
  EXPECT_TRUE(rows.CheckComplete().ok());
  EXPECT_TRUE(rows.Runs(1).empty());
}

}  // namespace
}  // namespace clusterkv::worker
