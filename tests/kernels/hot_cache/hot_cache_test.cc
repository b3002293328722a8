#include "kernels/hot_cache/hot_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <list>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "tests/test_seed.h"

namespace clusterkv::kernels {
namespace {

using ::testing::ElementsAre;

struct StepResult {
  std::vector<int32_t> slots;
  std::vector<uint8_t> hits;
};

HotCache MakeCache(HotCachePolicy policy, int64_t capacity, int64_t step_tokens, int steps = 1) {
  auto cache = HotCache::Create({policy, capacity, step_tokens, steps});
  EXPECT_TRUE(cache.ok()) << cache.status();
  return std::move(cache).value();
}

StepResult Resolve(HotCache& cache, const std::vector<int32_t>& positions,
                   const std::vector<int32_t>& clusters = {}) {
  StepResult result{std::vector<int32_t>(positions.size(), -7),
                    std::vector<uint8_t>(positions.size(), 7)};
  const absl::Status status =
      cache.Resolve(positions, clusters, absl::MakeSpan(result.slots), absl::MakeSpan(result.hits));
  EXPECT_TRUE(status.ok()) << status;
  return result;
}

TEST(HotCacheTest, RefusesSizesOutOfRange) {
  for (const HotCacheParams& params : std::vector<HotCacheParams>{
           {HotCachePolicy::kTokenLru, -1, 4, 1},
           {HotCachePolicy::kTokenLru, 1 << 24, 4, 1},
           {HotCachePolicy::kTokenLru, 4, 0, 1},
           {HotCachePolicy::kTokenLru, 4, 1 << 24, 1},
           {HotCachePolicy::kLastSteps, 4, 4, 0},
           {static_cast<HotCachePolicy>(9), 4, 4, 1},
           {static_cast<HotCachePolicy>(0), 4, 4, 1},
       }) {
    EXPECT_EQ(HotCache::Create(params).status().code(), absl::StatusCode::kInvalidArgument);
  }
}

TEST(HotCacheTest, SecondStepHitsWhatTheFirstRecalled) {
  HotCache cache = MakeCache(HotCachePolicy::kTokenLru, 4, 3);
  const StepResult first = Resolve(cache, {10, 20, 30});
  EXPECT_THAT(first.hits, ElementsAre(0, 0, 0));
  const StepResult second = Resolve(cache, {20, 40});
  EXPECT_THAT(second.hits, ElementsAre(1, 0));
  EXPECT_EQ(second.slots[0], first.slots[1]);
  EXPECT_EQ(cache.size(), 4);
}

TEST(HotCacheTest, LeastRecentlyUsedTokenLeavesFirst) {
  HotCache cache = MakeCache(HotCachePolicy::kTokenLru, 3, 3);
  Resolve(cache, {1, 2, 3});
  Resolve(cache, {1});
  Resolve(cache, {4});
  EXPECT_TRUE(cache.Contains(1));
  EXPECT_FALSE(cache.Contains(2));
  EXPECT_TRUE(cache.Contains(3));
  EXPECT_TRUE(cache.Contains(4));
}

TEST(HotCacheTest, StepBeyondCapacityKeepsItsLastTokensAndAllSlots) {
  HotCache cache = MakeCache(HotCachePolicy::kTokenLru, 2, 5);
  const StepResult result = Resolve(cache, {1, 2, 3, 4, 5});
  EXPECT_EQ(std::set<int32_t>(result.slots.begin(), result.slots.end()).size(), 5u);
  EXPECT_EQ(cache.size(), 2);
  EXPECT_FALSE(cache.Contains(3));
  EXPECT_TRUE(cache.Contains(4));
  EXPECT_THAT(Resolve(cache, {1, 2, 3, 4, 5}).hits, ElementsAre(0, 0, 0, 1, 1));
}

TEST(HotCacheTest, WithoutCapacityEveryTokenMisses) {
  HotCache cache = MakeCache(HotCachePolicy::kTokenLru, 0, 2);
  for (int i = 0; i < 3; ++i) EXPECT_THAT(Resolve(cache, {1, 2}).hits, ElementsAre(0, 0));
  EXPECT_EQ(cache.size(), 0);
  EXPECT_EQ(cache.slot_count(), 2);
}

TEST(HotCacheTest, WithoutPinsNoSlotBeyondTheLargerOfCapacityAndStepIsUsed) {
  for (const auto& [capacity, step] : std::vector<std::pair<int, int>>{{8, 5}, {5, 8}, {1, 1}}) {
    HotCache cache = MakeCache(HotCachePolicy::kTokenLru, capacity, step);
    for (int round = 0; round < 50; ++round) {
      std::vector<int32_t> positions;
      for (int i = 0; i < step; ++i) positions.push_back(round * (1 + round % 3) + i);
      for (const int32_t slot : Resolve(cache, positions).slots) {
        EXPECT_LT(slot, std::max(capacity, step));
      }
    }
  }
}

TEST(HotCacheTest, EmptyStepChangesNothingButAge) {
  HotCache cache = MakeCache(HotCachePolicy::kTokenLru, 4, 4);
  Resolve(cache, {1, 2});
  const uint64_t digest = cache.Digest();
  Resolve(cache, {});
  EXPECT_EQ(cache.Digest(), digest);
}

TEST(HotCacheTest, LastStepsForgetsWhatIsOlder) {
  HotCache cache = MakeCache(HotCachePolicy::kLastSteps, 100, 4, 2);
  Resolve(cache, {1, 2});
  Resolve(cache, {2, 3});
  EXPECT_THAT(Resolve(cache, {1, 4}).hits, ElementsAre(1, 0));
  Resolve(cache, {5});
  EXPECT_FALSE(cache.Contains(2));
  EXPECT_FALSE(cache.Contains(3));
  EXPECT_TRUE(cache.Contains(1));
}

TEST(HotCacheTest, LastStepsNeverHoldsMoreThanCapacity) {
  HotCache cache = MakeCache(HotCachePolicy::kLastSteps, 3, 4, 5);
  Resolve(cache, {1, 2});
  Resolve(cache, {3, 4});
  EXPECT_EQ(cache.size(), 3);
  EXPECT_FALSE(cache.Contains(1));
}

TEST(HotCacheTest, ClustersLeaveWhole) {
  HotCache cache = MakeCache(HotCachePolicy::kClusterLru, 5, 4);
  Resolve(cache, {1, 2, 3}, {7, 7, 8});
  Resolve(cache, {3, 9, 10}, {8, 9, 9});
  EXPECT_EQ(cache.size(), 5);
  Resolve(cache, {11}, {9});  // one over: the cluster of 1 and 2 is the oldest
  EXPECT_EQ(cache.size(), 4);
  EXPECT_FALSE(cache.Contains(1));
  EXPECT_FALSE(cache.Contains(2));
  EXPECT_TRUE(cache.Contains(3));
}

TEST(HotCacheTest, PinnedTokensStay) {
  HotCache cache = MakeCache(HotCachePolicy::kTokenLru, 2, 2);
  Resolve(cache, {1, 2});
  ASSERT_TRUE(cache.Pin(1).ok());
  Resolve(cache, {3, 4});
  EXPECT_TRUE(cache.Contains(1));
  EXPECT_TRUE(cache.Contains(4));
  EXPECT_EQ(cache.size(), 2);
  ASSERT_TRUE(cache.Unpin(1).ok());
  Resolve(cache, {5});
  EXPECT_FALSE(cache.Contains(1));
}

TEST(HotCacheTest, PinNamesWhatIsWrong) {
  HotCache cache = MakeCache(HotCachePolicy::kTokenLru, 1, 2);
  Resolve(cache, {1, 2});
  EXPECT_EQ(cache.Pin(1).code(), absl::StatusCode::kNotFound);  // left at the end of its step
  EXPECT_EQ(cache.Unpin(2).code(), absl::StatusCode::kNotFound);
  ASSERT_TRUE(cache.Pin(2).ok());
  ASSERT_TRUE(cache.Pin(2).ok());
  Resolve(cache, {3});
  EXPECT_EQ(cache.Pin(3).code(), absl::StatusCode::kNotFound);  // no room beside the pinned one
}

TEST(HotCacheTest, BadStepsChangeNothing) {
  HotCache cache = MakeCache(HotCachePolicy::kClusterLru, 4, 3);
  Resolve(cache, {1, 2}, {0, 1});
  const uint64_t digest = cache.Digest();
  std::vector<int32_t> slots(4);
  std::vector<uint8_t> hits(4);
  const auto refused = [&](std::vector<int32_t> positions, std::vector<int32_t> clusters,
                           size_t out) {
    const absl::Status status = cache.Resolve(positions, clusters, absl::MakeSpan(slots).first(out),
                                              absl::MakeSpan(hits).first(out));
    return status.code() == absl::StatusCode::kInvalidArgument && cache.Digest() == digest;
  };
  EXPECT_TRUE(refused({1, 2, 3, 4}, {0, 0, 0, 0}, 4));
  EXPECT_TRUE(refused({1, 2}, {0}, 2));
  EXPECT_TRUE(refused({1, 2}, {0, 0}, 1));
  EXPECT_TRUE(refused({5, 1, 5}, {0, 0, 0}, 3));
  EXPECT_TRUE(refused({-1}, {0}, 1));
  EXPECT_TRUE(refused({1}, {-2}, 1));
}

TEST(HotCacheTest, ClearedCacheEqualsANewOne) {
  for (const HotCachePolicy policy :
       {HotCachePolicy::kTokenLru, HotCachePolicy::kClusterLru, HotCachePolicy::kLastSteps}) {
    HotCache used = MakeCache(policy, 3, 3);
    HotCache fresh = MakeCache(policy, 3, 3);
    const bool by_cluster = policy == HotCachePolicy::kClusterLru;
    const auto step = [&](HotCache& cache, std::vector<int32_t> positions) {
      return Resolve(cache, positions, by_cluster ? positions : std::vector<int32_t>());
    };
    step(used, {1, 2, 3});
    step(used, {4, 2});
    ASSERT_TRUE(used.Pin(2).ok());
    used.Clear();
    EXPECT_EQ(used.size(), 0);
    EXPECT_FALSE(used.Contains(2));
    EXPECT_EQ(used.Digest(), fresh.Digest());
    EXPECT_EQ(step(used, {9, 8}).slots, step(fresh, {9, 8}).slots);
    EXPECT_EQ(used.Digest(), fresh.Digest());
  }
}

TEST(HotCacheTest, DigestTellsOrdersApart) {
  HotCache a = MakeCache(HotCachePolicy::kTokenLru, 4, 4);
  HotCache b = MakeCache(HotCachePolicy::kTokenLru, 4, 4);
  Resolve(a, {1, 2});
  Resolve(b, {1, 2});
  EXPECT_EQ(a.Digest(), b.Digest());
  Resolve(a, {1});
  EXPECT_NE(a.Digest(), b.Digest());
}

// The dullest cache that does what the header says.
class Model {
 public:
  explicit Model(const HotCacheParams& params) : params_(params) {}

  bool Contains(int32_t position) const { return tokens_.contains(position); }
  int64_t size() const { return static_cast<int64_t>(tokens_.size()); }
  bool CanPin() const { return static_cast<int64_t>(pinned_.size()) < params_.capacity_tokens; }
  bool IsPinned(int32_t position) const { return pinned_.contains(position); }
  void Pin(int32_t position) { pinned_.insert(position); }
  void Unpin(int32_t position) { pinned_.erase(position); }
  void Clear() { *this = Model(params_); }

  std::vector<uint8_t> Step(const std::vector<int32_t>& positions,
                            const std::vector<int32_t>& clusters) {
    std::vector<uint8_t> hits;
    ++step_;
    for (size_t i = 0; i < positions.size(); ++i) {
      const auto found = tokens_.find(positions[i]);
      hits.push_back(found != tokens_.end());
      // What is ordered: tokens, or clusters.
      int32_t key = positions[i];
      if (!clusters.empty()) key = found != tokens_.end() ? found->second.cluster : clusters[i];
      tokens_[positions[i]] = {key, step_};
      order_.remove(key);
      order_.push_back(key);
    }
    if (params_.policy == HotCachePolicy::kLastSteps) {
      DropIf([&](int32_t key) { return step_ - tokens_.at(key).step >= params_.steps; });
    }
    DropIf([&](int32_t) { return size() > params_.capacity_tokens; });
    return hits;
  }

 private:
  struct Token {
    int32_t cluster = 0;  // or itself
    int64_t step = 0;
  };

  // Oldest first, drops the unpinned tokens of each key for which leave(key).
  template <typename Leave>
  void DropIf(Leave leave) {
    for (auto key = order_.begin(); key != order_.end();) {
      if (!leave(*key)) {
        ++key;
        continue;
      }
      bool kept = false;
      for (auto token = tokens_.begin(); token != tokens_.end();) {
        const bool member = token->second.cluster == *key;
        kept |= member && pinned_.contains(token->first);
        token = member && !pinned_.contains(token->first) ? tokens_.erase(token) : std::next(token);
      }
      key = kept ? std::next(key) : order_.erase(key);
    }
  }

  HotCacheParams params_;
  std::map<int32_t, Token> tokens_;
  std::list<int32_t> order_;
  std::set<int32_t> pinned_;
  int64_t step_ = 0;
};

class Fuzz {
 public:
  Fuzz(const HotCacheParams& params, uint64_t seed)
      : params_(params), random_(seed), model_(params) {
    caches_.push_back(HotCache::Create(params).value());
    caches_.push_back(HotCache::Create(params).value());
    universe_ = 2 + static_cast<int>(params.capacity_tokens + params.step_tokens) * 2;
  }

  void Run(int operations) {
    for (int i = 0; i < operations && !testing::Test::HasFailure(); ++i) {
      const int choice = Below(100);
      if (choice < 80) {
        Step();
      } else if (choice < 90) {
        Pin(Below(universe_));
      } else if (choice < 99 || i % 7 != 0) {
        Unpin(Below(universe_));
      } else {
        Clear();
      }
      ASSERT_EQ(caches_[0].size(), model_.size());
      const int32_t probe = Below(universe_);
      ASSERT_EQ(caches_[0].Contains(probe), model_.Contains(probe));
      if (i % 16 == 0) {
        ASSERT_EQ(caches_[0].Digest(), caches_[1].Digest());
      }
    }
  }

 private:
  int Below(int bound) { return static_cast<int>(random_() % bound); }

  void Step() {
    std::set<int32_t> chosen;
    const int count = Below(static_cast<int>(params_.step_tokens) + 1);
    // Steps resemble each other, as queries do.
    drift_ = (drift_ + Below(3)) % universe_;
    while (static_cast<int>(chosen.size()) < count) {
      chosen.insert(Below(2) == 0 ? Below(universe_) : (drift_ + Below(2 * count)) % universe_);
    }
    std::vector<int32_t> positions(chosen.begin(), chosen.end());
    if (Below(4) == 0) std::shuffle(positions.begin(), positions.end(), random_);
    std::vector<int32_t> clusters;
    if (params_.policy == HotCachePolicy::kClusterLru) {
      for (const int32_t position : positions) clusters.push_back(position / 3);
    }
    const std::vector<uint8_t> hits = model_.Step(positions, clusters);
    const StepResult result = Resolve(caches_[0], positions, clusters);
    const StepResult mirror = Resolve(caches_[1], positions, clusters);
    ASSERT_EQ(result.hits, hits);
    ASSERT_EQ(result.slots, mirror.slots);
    CheckSlots(positions, result);
  }

  // Every token of the step and every resident one has a slot of its own, and keeps it while it
  // stays.
  void CheckSlots(const std::vector<int32_t>& positions, const StepResult& result) {
    for (size_t i = 0; i < positions.size(); ++i) {
      if (result.hits[i]) {
        ASSERT_EQ(slot_of_.at(positions[i]), result.slots[i]);
      }
      slot_of_[positions[i]] = result.slots[i];
    }
    std::set<int32_t> taken;
    for (const int32_t slot : result.slots) {
      ASSERT_GE(slot, 0);
      ASSERT_LT(slot, caches_[0].slot_count());
      ASSERT_TRUE(taken.insert(slot).second);
    }
    const std::set<int32_t> of_step(positions.begin(), positions.end());
    for (auto held = slot_of_.begin(); held != slot_of_.end();) {
      if (!model_.Contains(held->first)) {
        held = slot_of_.erase(held);
        continue;
      }
      if (!of_step.contains(held->first)) {
        ASSERT_TRUE(taken.insert(held->second).second);
      }
      ++held;
    }
  }

  void Pin(int32_t position) {
    const absl::StatusCode expected = !model_.Contains(position) ? absl::StatusCode::kNotFound
                                      : model_.IsPinned(position) || model_.CanPin()
                                          ? absl::StatusCode::kOk
                                          : absl::StatusCode::kResourceExhausted;
    for (HotCache& cache : caches_) ASSERT_EQ(cache.Pin(position).code(), expected);
    if (expected == absl::StatusCode::kOk) model_.Pin(position);
  }
  void Unpin(int32_t position) {
    const bool pinned = model_.IsPinned(position);
    for (HotCache& cache : caches_) ASSERT_EQ(cache.Unpin(position).ok(), pinned);
    model_.Unpin(position);
  }
  void Clear() {
    for (HotCache& cache : caches_) cache.Clear();
    model_.Clear();
    slot_of_.clear();
  }

  const HotCacheParams params_;
  std::mt19937_64 random_;
  Model model_;
  std::vector<HotCache> caches_;  // the cache, and its mirror
  std::map<int32_t, int32_t> slot_of_;
  int universe_ = 0;
  int drift_ = 0;
};

TEST(HotCacheFuzzTest, AgreesWithTheModelOverAMillionOperations) {
  const uint64_t seed = TestSeed(20250207);
  const std::vector<std::pair<int64_t, int64_t>> sizes = {{0, 3}, {1, 1}, {2, 7},
                                                          {5, 3}, {7, 7}, {48, 12}};
  std::mt19937_64 seeds(seed);
  int runs = 0;
  for (const HotCachePolicy policy :
       {HotCachePolicy::kTokenLru, HotCachePolicy::kClusterLru, HotCachePolicy::kLastSteps}) {
    for (const auto& [capacity, step] : sizes) {
      SCOPED_TRACE(testing::Message() << "policy " << static_cast<int>(policy) << " capacity "
                                      << capacity << " step " << step);
      Fuzz fuzz({policy, capacity, step, 1 + runs++ % 3}, seeds());
      fuzz.Run(kFuzzOperations / 18 + 1);
      ASSERT_FALSE(HasFailure());
    }
  }
}

}  // namespace
}  // namespace clusterkv::kernels
