// The small rooms of the shard by themselves: memory accounts, rows, eviction policies, counters.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "cache_service/attachments.h"
#include "cache_service/eviction_policy.h"
#include "cache_service/memory_account.h"
#include "cache_service/paged_rows.h"
#include "cache_service/sessions.h"
#include "cache_service/shard_counters.h"
#include "tests/cache_service/shard_harness.h"

namespace clusterkv::cache_service {
namespace {

constexpr int64_t kPage = 4096;

MemoryPlan Plan(int64_t parts, int64_t staging, int64_t window) {
  MemoryPlan plan;
  plan[MemoryUse::kParts] = parts;
  plan[MemoryUse::kStaging] = staging;
  plan[MemoryUse::kWindow] = window;
  return plan;
}

// --- MemoryAccount

TEST(MemoryAccountTest, PromisesAllOrNothing) {
  const auto arena = Arena::Create(10 * kPage, kPage).value();
  EXPECT_EQ(Reason(MemoryAccount::Open(arena.get(), Plan(5, 5, 1)).status()), v1::ARENA_FULL);
  EXPECT_EQ(arena->ledger().reserved, 0);
  const auto account = MemoryAccount::Open(arena.get(), Plan(5, 3, 2)).value();
  EXPECT_EQ(arena->ledger().reserved, 10);
  EXPECT_EQ(account->reserved_pages(), 10);
}

TEST(MemoryAccountTest, FreedMemoryGoesBackToItsPromise) {
  const auto arena = Arena::Create(10 * kPage, kPage).value();
  const auto account = MemoryAccount::Open(arena.get(), Plan(0, 4, 0)).value();
  PageBlock one = account->Allocate(MemoryUse::kStaging, 3).value();
  PageBlock two = account->Allocate(MemoryUse::kStaging, 3).value();  // two of them not promised
  EXPECT_EQ(account->reserved_pages(), 0);
  EXPECT_EQ(arena->ledger().free, 4);
  account->Free(MemoryUse::kStaging, std::move(one));
  EXPECT_EQ(account->reserved_pages(), 1) << "of the four promised, three are in use";
  account->Free(MemoryUse::kStaging, std::move(two));
  EXPECT_EQ(account->reserved_pages(), 4) << "never more than was promised";
  EXPECT_EQ(arena->ledger().free, 10);
}

TEST(MemoryAccountTest, WaivedPromisesAreGivenBackForGood) {
  const auto arena = Arena::Create(10 * kPage, kPage).value();
  const auto account = MemoryAccount::Open(arena.get(), Plan(2, 4, 0)).value();
  PageBlock block = account->Allocate(MemoryUse::kStaging, 3).value();
  account->Waive(MemoryUse::kStaging);
  EXPECT_EQ(account->reserved_pages(), 2);
  account->Free(MemoryUse::kStaging, std::move(block));
  EXPECT_EQ(account->reserved_pages(), 2);
  account->Close();
  EXPECT_EQ(arena->ledger().reserved, 0);
  EXPECT_TRUE(account->Allocate(MemoryUse::kParts, 1).ok()) << "out of what is free for all";
}

TEST(MemoryPlanTest, ShapesBeyondAPageAreRefused) {
  TestKv kv = MakeKv(TestShape(), 1, 1);
  kv.shape.set_kv_heads(64);
  kv.shape.set_query_heads(64);
  kv.shape.set_head_dim(64);
  const SequenceParams wide = ResolveParams(OpenRequest("a", kv, 100)).value();
  EXPECT_EQ(RowBytes(wide.shape), 8192);
  EXPECT_EQ(Reason(PlanSequence(wide, 4096).status()), v1::INVALID_FIELD);
  EXPECT_TRUE(PlanSequence(wide, 8192).ok());
  kv.shape.set_kv_heads(1);
  kv.shape.set_query_heads(1);
  kv.shape.set_head_dim(512);  // [3, head_dim] floats of channels are 6 KiB
  const SequenceParams deep = ResolveParams(OpenRequest("a", kv, 100)).value();
  EXPECT_EQ(Reason(PlanSequence(deep, 4096).status()), v1::INVALID_FIELD);
  EXPECT_TRUE(PlanSequence(deep, 8192).ok());
}

TEST(MemoryPlanTest, WindowsArePlannedForAllDecodedTokens) {
  const TestKv kv = MakeKv(TestShape(), 1, 1);
  v1::OpenSequenceRequest request = OpenRequest("a", kv, 100);
  request.mutable_index()->set_window_tokens(32);
  const SequenceParams params = ResolveParams(request).value();
  EXPECT_EQ(PlanDecode(params, 0, 0, kPage)->total(), 0);
  const MemoryPlan part_of_one = PlanDecode(params, 0, 31, kPage).value();
  EXPECT_EQ(part_of_one[MemoryUse::kParts], 0);
  EXPECT_EQ(part_of_one[MemoryUse::kWindow], 2 * 2);  // layers, K and V
  const MemoryPlan three = PlanDecode(params, 0, 100, kPage).value();
  EXPECT_EQ(three[MemoryUse::kWindow], 2 * 2 * 2) << "one fills while one is clustered";
  EXPECT_EQ(three[MemoryUse::kParts], 3 * PlanDecode(params, 0, 32, kPage)->pages[0]);
  EXPECT_EQ(PlanDecode(params, 20, 80, kPage)->total(), three.total()) << "rows that lie there";
}

// --- PagedRows

TEST(PagedRowsTest, GrowsWithoutMovingAndGivesItsPagesBack) {
  const auto arena = Arena::Create(64 * kPage, kPage).value();
  const auto account = MemoryAccount::Open(arena.get(), Plan(0, 0, 64)).value();
  constexpr int64_t kRow = 1000;  // four in a page
  {
    PagedRows rows(account, MemoryUse::kWindow, kRow, 50);
    const auto allocate = [&](int64_t pages) {
      return account->Allocate(MemoryUse::kWindow, pages);
    };
    const std::string keys(50 * kRow, 'k'), values(50 * kRow, 'v');
    EXPECT_EQ(rows.PagesToGrow(0), 0);
    EXPECT_EQ(rows.PagesToGrow(5), 4);
    ASSERT_TRUE(rows.Grow(5, allocate).ok());
    EXPECT_EQ(rows.PagesToGrow(8), 0) << "the last page has room";
    rows.Write(0, 5, keys.data(), values.data());
    const kernels::MutablePagedView before = rows.Keys(5);
    ASSERT_TRUE(rows.Grow(50, allocate).ok());
    EXPECT_EQ(rows.page_count(), 26);
    rows.Write(5, 45, keys.data(), values.data());
    EXPECT_EQ(before.At(4), rows.Keys(50).At(4));
    EXPECT_EQ(rows.FirstDifference(0, 50, keys.data(), values.data()), -1);
    std::string other = values;
    other[static_cast<size_t>(37 * kRow + 999)] = 'x';
    EXPECT_EQ(rows.FirstDifference(0, 50, keys.data(), other.data()), 37);
    EXPECT_EQ(rows.FirstDifference(38, 12, keys.data() + 38 * kRow, other.data() + 38 * kRow), -1);
    EXPECT_EQ(Reason(rows.Grow(50,
                               [](int64_t) -> absl::StatusOr<PageBlock> {
                                 ADD_FAILURE() << "nothing to allocate";
                                 return absl::InternalError("");
                               })),
              v1::ERROR_REASON_UNSPECIFIED);
  }
  EXPECT_EQ(account->reserved_pages(), 64);
}

TEST(PagedRowsTest, FailedGrowthChangesNothing) {
  const auto arena = Arena::Create(4 * kPage, kPage).value();
  const auto account = MemoryAccount::Open(arena.get(), Plan(0, 0, 0)).value();
  PagedRows rows(account, MemoryUse::kWindow, 4096, 50);
  const auto allocate = [&](int64_t pages) { return account->Allocate(MemoryUse::kWindow, pages); };
  ASSERT_TRUE(rows.Grow(1, allocate).ok());
  EXPECT_EQ(Reason(rows.Grow(3, allocate)), v1::ARENA_FULL);
  EXPECT_EQ(rows.capacity(), 1);
  EXPECT_EQ(rows.page_count(), 2);
  EXPECT_TRUE(rows.Grow(2, allocate).ok());
}

// --- policies, counters, ids

TEST(EvictionPolicyTest, LruChoosesTheLongestUnused) {
  const EvictionPolicy* lru = FindEvictionPolicy("lru");
  ASSERT_NE(lru, nullptr);
  EXPECT_EQ(lru->Choose({{7, 1}, {3, 100}, {5, 1}}), 1u);
  EXPECT_EQ(lru->Choose({{7, 1}}), 0u);
  EXPECT_EQ(FindEvictionPolicy("newest"), nullptr);
}

TEST(LatencyHistogramTest, QuantilesAreAnEighthAboveTheTruthAtMost) {
  LatencyHistogram empty;
  EXPECT_EQ(empty.QuantileUs(0.5), 0u);
  for (int64_t us : {0, 1, 7, 8, 9, 100, 1000, 12345, 1'000'000, 100'000'000}) {
    LatencyHistogram histogram;
    histogram.Record(absl::Microseconds(us));
    const double quantile = histogram.QuantileUs(0.5);
    EXPECT_GE(quantile, us);
    EXPECT_LE(quantile, us * 1.125 + 1);
  }
  LatencyHistogram mixed;
  for (int i = 0; i < 98; ++i) mixed.Record(absl::Microseconds(10));
  for (int i = 0; i < 2; ++i) mixed.Record(absl::Milliseconds(5));
  EXPECT_LE(mixed.QuantileUs(0.5), 12u);
  EXPECT_GE(mixed.QuantileUs(0.99), 5000u);
  mixed.Record(absl::ZeroDuration() - absl::Seconds(1));  // clocks step back
  mixed.Record(absl::InfiniteDuration());
}

TEST(ResidencyBudgetTest, TakesAllOrNothing) {
  ResidencyBudget budget(100);
  EXPECT_TRUE(budget.Take(60).ok());
  EXPECT_EQ(Reason(budget.Take(41)), v1::LIMIT_EXCEEDED);
  EXPECT_TRUE(budget.Take(40).ok());
  budget.Give(100);
  EXPECT_EQ(budget.used(), 0);
}

TEST(RandomIdTest, IsNeverZeroNorTwiceTheSame) {
  std::set<uint64_t> ids;
  for (int i = 0; i < 1000; ++i) ids.insert(RandomId());
  EXPECT_EQ(ids.size(), 1000u);
  EXPECT_FALSE(ids.contains(0));
}

}  // namespace
}  // namespace clusterkv::cache_service
