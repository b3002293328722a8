#include "cache_service/range_allocator.h"

#include <gtest/gtest.h>

#include <map>
#include <random>

#include "tests/cache_service/shard_harness.h"
#include "tests/test_seed.h"

namespace clusterkv::cache_service {
namespace {

TEST(RangeAllocatorTest, RangesBeginAtGranulesAndDoNotOverlap) {
  RangeAllocator ranges(1000, 64);
  EXPECT_EQ(ranges.free_bytes(), 960);
  EXPECT_EQ(ranges.Allocate(1), 0);
  EXPECT_EQ(ranges.Allocate(65), 64);
  EXPECT_EQ(ranges.Allocate(64), 192);
  EXPECT_EQ(ranges.free_bytes(), 960 - 256);
  EXPECT_EQ(ranges.Allocate(705), std::nullopt);
}

TEST(RangeAllocatorTest, NothingIsToBeHadFromNothing) {
  RangeAllocator ranges(0, 256);
  EXPECT_EQ(ranges.Allocate(1), std::nullopt);
}

TEST(RangeAllocatorTest, FreedNeighboursAreOneRangeAgain) {
  RangeAllocator ranges(4 * 64, 64);
  for (int i = 0; i < 4; ++i) ASSERT_EQ(ranges.Allocate(64), i * 64);
  ranges.Free(64, 64);
  ranges.Free(192, 64);
  EXPECT_EQ(ranges.Allocate(128), std::nullopt);
  ranges.Free(128, 64);
  EXPECT_EQ(ranges.Allocate(192), 64);
}

TEST(RangeAllocatorTest, RandomUseKeepsTheCount) {
  std::mt19937_64 random(TestSeed(20240607));
  RangeAllocator ranges(1 << 16, 256);
  std::map<int64_t, int64_t> held;
  for (int i = 0; i < 20000; ++i) {
    if (held.empty() || random() % 2 == 0) {
      const auto bytes = static_cast<int64_t>(1 + random() % 5000);
      const auto begin = ranges.Allocate(bytes);
      if (!begin.has_value()) continue;
      const auto after = held.lower_bound(*begin);
      ASSERT_TRUE(after == held.end() || after->first >= *begin + bytes);
      if (after != held.begin()) {
        const auto before = std::prev(after);
        ASSERT_LE(before->first + before->second, *begin);
      }
      held.emplace(*begin, bytes);
    } else {
      const auto it = std::next(held.begin(), static_cast<int64_t>(random() % held.size()));
      ranges.Free(it->first, it->second);
      held.erase(it);
    }
  }
  for (const auto& [begin, bytes] : held) ranges.Free(begin, bytes);
  EXPECT_EQ(ranges.free_bytes(), 1 << 16);
  EXPECT_EQ(ranges.Allocate(1 << 16), 0);
}

}  // namespace
}  // namespace clusterkv::cache_service
