// What resident kernels and selects ask of a device's multiprocessors always finds a place there.
#include "cache_service/resident_shares.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace clusterkv::cache_service {
namespace {

constexpr int kMultiprocessors[] = {8, 78, 108, 114, 132, 144, 160};
constexpr int kPairs[] = {1, 7, 8, 32, 64, 127, 128, 512};
constexpr int kProcessingClusters = 8;

// Free multiprocessors of each processing cluster: they come in pairs.
std::vector<int> EmptyDevice(int multiprocessors) {
  std::vector<int> free(kProcessingClusters, 0);
  for (int i = 0; i < multiprocessors; ++i) ++free[i / 2 % kProcessingClusters];
  return free;
}

// One whose free multiprocessors lie so that they are least of use: evenly spread.
std::vector<int> SpreadDevice(int multiprocessors) {
  std::vector<int> free(kProcessingClusters, 0);
  for (int i = 0; i < multiprocessors; ++i) ++free[i % kProcessingClusters];
  return free;
}

// Takes the place of so many clusters of so many blocks; false: there is none.
bool Take(std::vector<int>& free, int clusters, int blocks) {
  for (; clusters > 0; --clusters) {
    int& most = *std::max_element(free.begin(), free.end());
    if (most < blocks) return false;
    most -= blocks;
  }
  return true;
}

TEST(ResidentSharesTest, GroupsHaveEqualSharesAndLeaveSome) {
  EXPECT_EQ(PlaceOfGroup(132, 1, 8, true).blocks(), 64);
  EXPECT_EQ(PlaceOfGroup(132, 1, 128, true).blocks(), 128);
  EXPECT_EQ(PlaceOfGroup(132, 2, 128, true).blocks(), 64);
  EXPECT_EQ(PlaceOfGroup(132, 3, 128, false).blocks(), 40);
  for (const int multiprocessors : kMultiprocessors) {
    for (int groups = 1; groups <= MaxResidentGroups(multiprocessors); ++groups) {
      for (const int pairs : kPairs) {
        for (const bool alike : {false, true}) {
          const ResidentPlace place = PlaceOfGroup(multiprocessors, groups, pairs, alike);
          EXPECT_GE(place.clusters, 1);
          EXPECT_LE(place.clusters, pairs);
          EXPECT_LE(place.blocks() * groups, multiprocessors - multiprocessors / 32);
        }
      }
    }
  }
}

TEST(ResidentSharesTest, ADeviceTooSmallTakesNoGroup) {
  EXPECT_EQ(MaxResidentGroups(7), 0);
  EXPECT_EQ(MaxResidentGroups(132), 16);
}

TEST(ResidentSharesTest, FewPairsHaveManyBlocksEach) {
  EXPECT_EQ(PlaceOfGroup(132, 1, 8, true).blocks_per_pair, 8);
  EXPECT_EQ(PlaceOfGroup(132, 1, 32, true).blocks_per_pair, 2);
  EXPECT_EQ(PlaceOfGroup(132, 2, 32, true).blocks_per_pair, 2);
  EXPECT_EQ(PlaceOfGroup(132, 2, 64, true).blocks_per_pair, 1);
}

TEST(ResidentSharesTest, OneAndTwoAlikeTakeOneTurnAsLongAsPairsFit) {
  for (const int pairs : {8, 32, 64}) {
    for (const int groups : {1, 2}) {
      const ResidentPlace place = PlaceOfGroup(132, groups, pairs, true);
      EXPECT_LE(pairs, place.clusters) << groups;
    }
  }
}

TEST(ResidentSharesTest, EveryGroupFindsItsPlaceBesideTheOthers) {
  for (const int multiprocessors : kMultiprocessors) {
    for (int groups = 1; groups <= MaxResidentGroups(multiprocessors); ++groups) {
      for (const int pairs : kPairs) {
        const ResidentPlace unlike = PlaceOfGroup(multiprocessors, groups, pairs, false);
        const int share = (multiprocessors - multiprocessors / 32) / groups;
        std::vector<int> left = SpreadDevice(multiprocessors - (groups - 1) * share);
        EXPECT_TRUE(Take(left, unlike.clusters, unlike.blocks_per_pair))
            << multiprocessors << " for " << groups << " of " << pairs << " pairs";
        const ResidentPlace alike = PlaceOfGroup(multiprocessors, groups, pairs, true);
        std::vector<int> device = EmptyDevice(multiprocessors);
        EXPECT_TRUE(Take(device, groups * alike.clusters, alike.blocks_per_pair))
            << multiprocessors << " for " << groups << " of " << pairs << " pairs, alike";
      }
    }
  }
}

TEST(ResidentSharesTest, ASelectFindsAPlaceBesideGroups) {
  EXPECT_EQ(SelectBlocksPerPair(132, 0, 8), 0);
  for (const int multiprocessors : kMultiprocessors) {
    for (int held = 1; held <= multiprocessors - multiprocessors / 32; ++held) {
      for (const int pairs : kPairs) {
        const int blocks = SelectBlocksPerPair(multiprocessors, held, pairs);
        EXPECT_GE(blocks, 1);
        std::vector<int> left = SpreadDevice(multiprocessors - held);
        EXPECT_TRUE(held == multiprocessors || Take(left, 1, blocks))
            << multiprocessors << " - " << held;
      }
    }
  }
}

}  // namespace
}  // namespace clusterkv::cache_service
