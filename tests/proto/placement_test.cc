#include "proto/placement.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

namespace clusterkv {
namespace {

std::vector<v1::Shard> MakeShards(int count) {
  std::vector<v1::Shard> shards(count);
  for (int i = 0; i < count; ++i) shards[i].set_name("kv-" + std::to_string(i));
  return shards;
}

std::string Owner(const std::string& sequence, int shards) {
  return RankShards(sequence, MakeShards(shards)).front().name();
}

// What a client in another language must come to.
TEST(PlacementTest, ScoresAreXxh3OfTheNames) {
  EXPECT_EQ(PlacementScore("", ""), 4055606894390288348u);
  EXPECT_EQ(PlacementScore("chat-17", "kv-0"), 356415132629806331u);
  EXPECT_EQ(PlacementScore("chat-17", "kv-1"), 12838461109292577524u);
}

TEST(PlacementTest, EveryShardOwnsItsShare) {
  constexpr int kSequences = 30'000;
  std::map<std::string, int> owned;
  for (int i = 0; i < kSequences; ++i) ++owned[Owner("sequence-" + std::to_string(i), 3)];
  ASSERT_EQ(owned.size(), 3u);
  // 10,000 each, with a deviation of 82: six of them.
  for (const auto& [name, count] : owned) EXPECT_NEAR(count, kSequences / 3, 500) << name;
}

TEST(PlacementTest, AShardThatIsAddedTakesOnlyWhatItWins) {
  int moved = 0;
  for (int i = 0; i < 10'000; ++i) {
    const std::string sequence = "sequence-" + std::to_string(i);
    const std::string before = Owner(sequence, 4), after = Owner(sequence, 5);
    if (before == after) continue;
    EXPECT_EQ(after, "kv-4") << sequence;
    ++moved;
  }
  EXPECT_NEAR(moved, 2000, 240);
}

TEST(PlacementTest, TheNextInRankIsTheOwnerWithoutTheFirst) {
  for (int i = 0; i < 1000; ++i) {
    const std::string sequence = "sequence-" + std::to_string(i);
    std::vector<v1::Shard> ranked = RankShards(sequence, MakeShards(5));
    const std::string next = ranked[1].name();
    ranked.erase(ranked.begin());
    EXPECT_EQ(RankShards(sequence, ranked).front().name(), next);
  }
}

TEST(PlacementTest, TheOrderOfTheListDoesNotMatter) {
  std::vector<v1::Shard> backwards = MakeShards(7);
  std::reverse(backwards.begin(), backwards.end());
  EXPECT_EQ(RankShards("a", backwards).front().name(), Owner("a", 7));
  EXPECT_TRUE(RankShards("a", {}).empty());
  // Alike in everything that counts: by name, which cannot be told apart here.
  EXPECT_EQ(RankShards("a", {backwards[0], backwards[0]}).size(), 2u);
}

}  // namespace
}  // namespace clusterkv
