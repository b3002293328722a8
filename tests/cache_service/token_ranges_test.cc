#include "cache_service/token_ranges.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bitset>
#include <random>

#include "tests/cache_service/shard_harness.h"
#include "tests/test_seed.h"

namespace clusterkv::cache_service {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

TEST(TokenRangesTest, EmptySetMissesEverything) {
  const TokenRanges ranges;
  EXPECT_THAT(ranges.Missing({0, 5}), ElementsAre(TokenSpan{0, 5}));
  EXPECT_THAT(ranges.Missing({3, 3}), IsEmpty());
  EXPECT_THAT(ranges.Present({0, 5}), IsEmpty());
  EXPECT_EQ(ranges.tokens(), 0);
}

TEST(TokenRangesTest, NeighboursJoin) {
  TokenRanges ranges;
  ranges.Add({0, 2});
  ranges.Add({4, 6});
  EXPECT_EQ(ranges.ranges(), 2);
  EXPECT_THAT(ranges.Missing({0, 8}), ElementsAre(TokenSpan{2, 4}, TokenSpan{6, 8}));
  ranges.Add({2, 4});
  EXPECT_EQ(ranges.ranges(), 1);
  EXPECT_TRUE(ranges.Covers({0, 6}));
  EXPECT_FALSE(ranges.Covers({0, 7}));
}

TEST(TokenRangesTest, GapsAreNamedUpToALimit) {
  EXPECT_EQ(FormatSpans({}, 2), "");
  EXPECT_EQ(FormatSpans({{0, 5}, {7, 9}}, 2), "[0, 5) [7, 9)");
  EXPECT_EQ(FormatSpans({{0, 5}, {7, 9}, {10, 11}}, 2), "[0, 5) [7, 9) and 1 more");
}

TEST(TokenRangesFuzzTest, AgreesWithABitset) {
  std::mt19937_64 random(TestSeed(20240607));
  for (int round = 0; round < 2000; ++round) {
    TokenRanges ranges;
    std::bitset<64> bits;
    for (int step = 0; step < 20; ++step) {
      int64_t begin = static_cast<int64_t>(random() % 65),
              end = static_cast<int64_t>(random() % 65);
      if (begin > end) std::swap(begin, end);
      const TokenSpan span{begin, end};
      int64_t missing = 0, present = 0;
      for (const TokenSpan& sub : ranges.Missing(span)) {
        for (int64_t t = sub.begin; t < sub.end; ++t) ASSERT_FALSE(bits[t]);
        missing += sub.size();
      }
      for (const TokenSpan& sub : ranges.Present(span)) {
        for (int64_t t = sub.begin; t < sub.end; ++t) ASSERT_TRUE(bits[t]);
        present += sub.size();
      }
      ASSERT_EQ(missing + present, span.size());
      if (random() % 2 == 0) continue;
      ranges.Add(span);
      for (int64_t t = begin; t < end; ++t) bits.set(static_cast<size_t>(t));
      ASSERT_EQ(ranges.tokens(), static_cast<int64_t>(bits.count()));
    }
  }
}

}  // namespace
}  // namespace clusterkv::cache_service
