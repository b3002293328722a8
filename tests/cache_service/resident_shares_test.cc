// What resident kernels and selects ask of a device's multiprocessors always finds a place there.
#include "cache_service/resident_shares.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace clusterkv::cache_service {
namespace {

constexpr int kMultiprocessors[] = {1, 7, 78, 108, 114, 132, 144, 160};
constexpr int kPairs[] = {1, 7, 8, 32, 64, 127, 128, 512};

// Whether clusters of so many blocks find their places, when what is held already lies so that it
// is most in the way: evenly over eight processing clusters.
bool Placed(int multiprocessors, int held, int clusters, int blocks) {
  std::vector<int> free(8, 0);
  for (int i = 0; i < multiprocessors - held; ++i) ++free[i % free.size()];
  for (int& left : free) {
    const int here = std::min(clusters, left / blocks);
    clusters -= here;
  }
  return clusters == 0;
}

TEST(ResidentSharesTest, GroupsHaveEqualSharesAndLeaveAQuarter) {
  EXPECT_EQ(PlaceOfGroup(132, 1, 128).blocks(), 66);
  EXPECT_EQ(PlaceOfGroup(132, 2, 128).blocks(), 49);
  EXPECT_EQ(PlaceOfGroup(132, 3, 128).blocks(), 33);
  for (const int multiprocessors : kMultiprocessors) {
    for (int groups = 1; groups <= MaxResidentGroups(multiprocessors); ++groups) {
      for (const int pairs : kPairs) {
        const ResidentPlace place = PlaceOfGroup(multiprocessors, groups, pairs);
        EXPECT_GE(place.clusters, 1);
        EXPECT_LE(place.clusters, pairs);
        EXPECT_LE(place.blocks() * groups, multiprocessors * 3 / 4)
            << multiprocessors << " for " << groups;
      }
    }
  }
}

TEST(ResidentSharesTest, ADeviceTooSmallTakesNoGroup) {
  EXPECT_EQ(MaxResidentGroups(10), 0);
  EXPECT_EQ(MaxResidentGroups(132), 12);
}

TEST(ResidentSharesTest, FewPairsHaveManyBlocksEach) {
  EXPECT_EQ(PlaceOfGroup(132, 1, 8).blocks_per_pair, 8);
  EXPECT_EQ(PlaceOfGroup(132, 1, 32).blocks_per_pair, 2);
  EXPECT_EQ(PlaceOfGroup(132, 1, 64).blocks_per_pair, 1);
  EXPECT_EQ(PlaceOfGroup(132, 1, 128).blocks_per_pair, 1);
}

TEST(ResidentSharesTest, EveryGroupFindsItsPlaceBesideTheOthers) {
  for (const int multiprocessors : kMultiprocessors) {
    for (int groups = 1; groups <= MaxResidentGroups(multiprocessors); ++groups) {
      for (const int pairs : kPairs) {
        const ResidentPlace place = PlaceOfGroup(multiprocessors, groups, pairs);
        const int others = (groups - 1) * place.blocks();
        EXPECT_TRUE(Placed(multiprocessors, others, place.clusters, place.blocks_per_pair))
            << multiprocessors << " for " << groups << " of " << pairs << " pairs";
      }
    }
  }
}

TEST(ResidentSharesTest, ASelectFindsAPlaceBesideGroups) {
  EXPECT_EQ(SelectBlocksPerPair(132, 0, 8), 0);
  for (const int multiprocessors : kMultiprocessors) {
    for (int held = 1; held <= multiprocessors * 3 / 4; ++held) {
      for (const int pairs : kPairs) {
        const int blocks = SelectBlocksPerPair(multiprocessors, held, pairs);
        EXPECT_GE(blocks, 1);
        EXPECT_TRUE(Placed(multiprocessors, held, 1, blocks)) << multiprocessors << " - " << held;
      }
    }
  }
}

}  // namespace
}  // namespace clusterkv::cache_service
