#include "kernels/select/radix.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

namespace clusterkv::kernels {
namespace {

constexpr uint32_t kSeed = 31;

// Keys of the kinds that selection sorts: many equal ones, positions, and the bits of floats.
std::vector<uint32_t> Keys(int64_t count, int kind, std::mt19937& random) {
  std::vector<uint32_t> keys(count);
  for (uint32_t& key : keys) {
    if (kind == 0) key = random() % 5;
    if (kind == 1) key = random() % 40'000;
    if (kind == 2) key = static_cast<uint32_t>(random());
    if (kind == 3) key = 0x3f800000u + random() % 4096;
    if (kind == 4) key = 0xffffffffu;
  }
  return keys;
}

TEST(RadixTest, SortsItemsByKeyAndKeepsTheOrderOfEqualKeys) {
  std::mt19937 random(kSeed);
  RadixScratch scratch;
  for (int64_t count : {0, 1, 2, 31, 1000, 4099}) {
    for (int kind = 0; kind < 5; ++kind) {
      const std::vector<uint32_t> keys = Keys(count, kind, random);
      std::vector<uint32_t> items(count);
      std::iota(items.begin(), items.end(), 0u);
      std::shuffle(items.begin(), items.end(), random);
      std::vector<uint32_t> expected = items;
      std::stable_sort(expected.begin(), expected.end(),
                       [&](uint32_t a, uint32_t b) { return keys[a] < keys[b]; });
      SortByKey(keys.data(), scratch, &items);
      ASSERT_EQ(items, expected) << "count " << count << " kind " << kind;
    }
  }
}

TEST(RadixTest, FindsTheKthSmallest) {
  std::mt19937 random(kSeed);
  RadixScratch scratch;
  for (int64_t count : {1, 2, 31, 1000}) {
    for (int kind = 0; kind < 5; ++kind) {
      const std::vector<uint32_t> keys = Keys(count, kind, random);
      std::vector<uint32_t> sorted = keys;
      std::sort(sorted.begin(), sorted.end());
      for (int64_t k = 1; k <= count; k += 1 + count / 37) {
        ASSERT_EQ(KthSmallest(keys.data(), count, k, scratch), sorted[k - 1]) << k;
      }
      ASSERT_EQ(KthSmallest(keys.data(), count, count, scratch), sorted.back());
    }
  }
}

TEST(RadixDeathTest, ThereIsNoZerothSmallest) {
  const uint32_t key = 7;
  RadixScratch scratch;
  EXPECT_DEATH(KthSmallest(&key, 1, 0, scratch), "CHECK failed");
  EXPECT_DEATH(KthSmallest(&key, 1, 2, scratch), "CHECK failed");
}

}  // namespace
}  // namespace clusterkv::kernels
