// What resident kernels and selects ask of a device's multiprocessors always finds a place there.
#include "cache_service/resident_shares.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <iterator>
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

using Rounds = std::vector<ResidentRound>;

std::vector<ResidentLaunch> PlaceAlike(int multiprocessors, int groups,
                                       const ResidentRound& round) {
  return PlaceGroups(multiprocessors, Rounds(groups, round));
}

// Groups of one kind of rounds, and of several.
std::vector<Rounds> Mixes(int groups) {
  std::vector<Rounds> mixes;
  for (const int pairs : kPairs) {
    for (const int quads : {1, 2}) mixes.emplace_back(groups, ResidentRound{pairs, quads});
  }
  Rounds& mixed = mixes.emplace_back();
  for (int i = 0; i < groups; ++i) {
    mixed.push_back({kPairs[3 * i % std::size(kPairs)], 1 + i / 2 % 2});
  }
  Rounds& nearly_alike = mixes.emplace_back(groups, ResidentRound{128});
  nearly_alike.back().pairs = 127;
  return mixes;
}

void ForAll(const std::function<void(int, const Rounds&)>& check) {
  for (const int multiprocessors : kMultiprocessors) {
    for (int groups = 1; groups <= MaxResidentGroups(multiprocessors); ++groups) {
      for (const Rounds& rounds : Mixes(groups)) check(multiprocessors, rounds);
    }
  }
}

TEST(ResidentSharesTest, GroupsAlikeHaveEqualSharesAndAllLeaveSome) {
  EXPECT_EQ(PlaceAlike(132, 1, {8})[0].place.blocks(), 64);
  EXPECT_EQ(PlaceAlike(132, 1, {128})[0].place.blocks(), 128);
  EXPECT_TRUE(PlaceGroups(132, {}).empty());
  ForAll([](int multiprocessors, const Rounds& rounds) {
    int held = 0;
    for (const ResidentLaunch& launch : PlaceGroups(multiprocessors, rounds)) {
      held += launch.place.blocks();
      EXPECT_GE(launch.place.clusters, 1);
    }
    EXPECT_LE(held, multiprocessors - multiprocessors / 32);
  });
}

TEST(ResidentSharesTest, EachGroupHasOneKernelAndNoKernelTooMany) {
  ForAll([](int multiprocessors, const Rounds& rounds) {
    std::vector<int> kernels(rounds.size());
    for (const ResidentLaunch& launch : PlaceGroups(multiprocessors, rounds)) {
      EXPECT_LE(launch.groups.size(), kMaxGroupsOfKernel);
      int most = 0;
      for (const int group : launch.groups) {
        ++kernels[group];
        most = std::max(most, rounds[group].pairs);
        EXPECT_EQ(launch.place.blocks_per_pair % rounds[group].quads, 0);
      }
      EXPECT_LE(launch.place.clusters, most);
    }
    EXPECT_EQ(kernels, std::vector<int>(rounds.size(), 1));
  });
}

TEST(ResidentSharesTest, ADeviceTooSmallTakesNoGroup) {
  EXPECT_EQ(MaxResidentGroups(7), 0);
  EXPECT_EQ(MaxResidentGroups(132), 16);
}

TEST(ResidentSharesTest, FewPairsHaveManyBlocksEach) {
  EXPECT_EQ(PlaceAlike(132, 1, {8})[0].place.blocks_per_pair, 8);
  EXPECT_EQ(PlaceAlike(132, 1, {32})[0].place.blocks_per_pair, 2);
  EXPECT_EQ(PlaceAlike(132, 2, {32})[0].place.blocks_per_pair, 2);
  EXPECT_EQ(PlaceAlike(132, 2, {64})[0].place.blocks_per_pair, 1);
}

// Eight query heads.
TEST(ResidentSharesTest, TwoQuadsHaveABlockEachAtLeast) {
  EXPECT_EQ(PlaceAlike(132, 1, {8, 2})[0].place.blocks_per_pair, 8);
  EXPECT_EQ(PlaceAlike(132, 1, {32, 2})[0].place.blocks_per_pair, 2);
  EXPECT_EQ(PlaceAlike(132, 1, {64, 2})[0].place.clusters, 64);
  // A kernel for both kinds has blocks for the larger.
  const std::vector<ResidentLaunch> both = PlaceGroups(132, {{64, 2}, {128}});
  for (const ResidentLaunch& launch : both) {
    EXPECT_EQ(launch.place.blocks_per_pair, launch.groups[0] == 0 ? 2 : 1);
  }
  EXPECT_EQ(SelectBlocksPerPair(132, 64, {64, 2}), 2);
  EXPECT_EQ(SelectBlocksPerPair(132, 128, {64, 2}), 1) << "nothing surely fits";
}

TEST(ResidentSharesTest, OneAndTwoAlikeTakeOneTurnAsLongAsPairsFit) {
  for (const int pairs : {8, 32, 64, 100, 128}) {
    for (const int groups : {1, 2}) {
      for (const ResidentLaunch& launch : PlaceAlike(132, groups, {pairs})) {
        EXPECT_LE(pairs, launch.place.clusters) << groups;
      }
    }
  }
}

TEST(ResidentSharesTest, TogetherWhereNoRoundTakesLongerThanOnAKernelOfItsOwn) {
  struct Case {
    int groups, pairs;
    size_t kernels;
  };
  // The faster way, as measured (kernels/resident/DESIGN.md). Of 96 and 128 pairs a group alone
  // takes one turn, and one of two kernels takes two.
  const Case cases[] = {{2, 8, 2},   {2, 32, 2},  {2, 64, 2}, {2, 96, 1},
                        {2, 128, 1}, {3, 128, 1}, {4, 64, 2}};
  for (const auto& [groups, pairs, kernels] : cases) {
    EXPECT_EQ(PlaceAlike(132, groups, {pairs}).size(), kernels) << groups << " of " << pairs;
  }
  EXPECT_EQ(PlaceGroups(132, {{128}, {120}}).size(), 1u);
  // The short round would wait for the long one.
  EXPECT_EQ(PlaceGroups(132, {{128}, {8}}).size(), 2u);
  // Two of four each, on 64.
  const std::vector<ResidentLaunch> four = PlaceAlike(132, 4, {64});
  ASSERT_EQ(four.size(), 2u);
  EXPECT_EQ(four[0].groups, (std::vector<int>{0, 2}));
  EXPECT_EQ(four[1].place.clusters, 64);
}

TEST(ResidentSharesTest, EveryKernelFindsItsPlaceBesideTheOthers) {
  ForAll([](int multiprocessors, const Rounds& rounds) {
    const std::vector<ResidentLaunch> launches = PlaceGroups(multiprocessors, rounds);
    const bool alike = std::all_of(launches.begin(), launches.end(), [&](const auto& launch) {
      return launch.place.blocks_per_pair == launches[0].place.blocks_per_pair;
    });
    std::vector<int> device = EmptyDevice(multiprocessors);
    for (const ResidentLaunch& launch : launches) {
      const auto& [blocks, clusters] = launch.place;
      const int others = multiprocessors - multiprocessors / 32;
      std::vector<int> left =
          SpreadDevice(multiprocessors - others / static_cast<int>(launches.size()) *
                                             (static_cast<int>(launches.size()) - 1));
      EXPECT_TRUE(alike ? Take(device, clusters, blocks) : Take(left, clusters, blocks))
          << multiprocessors << " for " << launches.size() << " kernels";
    }
  });
}

TEST(ResidentSharesTest, ASelectFindsAPlaceBesideGroups) {
  EXPECT_EQ(SelectBlocksPerPair(132, 0, {8}), 0);
  for (const int multiprocessors : kMultiprocessors) {
    for (int held = 1; held <= multiprocessors - multiprocessors / 32; ++held) {
      for (const Rounds& rounds : Mixes(2)) {
        const int blocks = SelectBlocksPerPair(multiprocessors, held, rounds[1]);
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
