#include "cache_service/tenants.h"

#include <gtest/gtest.h>

#include "cache_service/tenant_names.h"
#include "cache_service/token_bucket.h"

namespace clusterkv::cache_service {
namespace {

TEST(TokenBucketTest, AllowsTheRateAndASecondSavedUp) {
  TokenBucket bucket(10);
  absl::Time now = absl::UnixEpoch() + absl::Hours(1);
  int taken = 0;
  while (bucket.Take(1, now) <= absl::ZeroDuration()) ++taken;
  EXPECT_EQ(taken, 10);
  const absl::Duration wait = bucket.Take(1, now);
  EXPECT_NEAR(absl::ToDoubleMilliseconds(wait), 100, 1);
  EXPECT_EQ(bucket.Take(1, now + wait), absl::ZeroDuration());
  now += absl::Hours(1);
  for (taken = 0; bucket.Take(1, now) <= absl::ZeroDuration();) ++taken;
  EXPECT_EQ(taken, 10) << "no more than a second is saved up";
}

TEST(TokenBucketTest, APieceLargerThanASecondsWorthIsPaidForAfterwards) {
  TokenBucket bucket(100);
  const absl::Time now = absl::UnixEpoch() + absl::Hours(1);
  EXPECT_EQ(bucket.Take(1000, now), absl::ZeroDuration());
  EXPECT_GT(bucket.Take(1, now + absl::Seconds(8)), absl::ZeroDuration());
  EXPECT_EQ(bucket.Take(1, now + absl::Seconds(10)), absl::ZeroDuration());
}

TEST(TokenBucketTest, ZeroIsNoLimitAndAClockThatJumpsBackTakesNothing) {
  TokenBucket none(0), ten(10);
  const absl::Time now = absl::UnixEpoch() + absl::Hours(2);
  for (int i = 0; i < 1000; ++i) EXPECT_EQ(none.Take(1e9, now), absl::ZeroDuration());
  EXPECT_EQ(ten.Take(1, now), absl::ZeroDuration());
  EXPECT_EQ(ten.Take(1, now - absl::Hours(1)), absl::ZeroDuration());
}

TEST(TenantsTest, IdentitiesMatchWholeOrByTheirBeginning) {
  EXPECT_TRUE(IdentityMatches("a", "a"));
  EXPECT_FALSE(IdentityMatches("a", "ab"));
  EXPECT_TRUE(IdentityMatches("spiffe://a/*", "spiffe://a/b"));
  EXPECT_FALSE(IdentityMatches("spiffe://a/*", "spiffe://ab"));
  EXPECT_TRUE(IdentityMatches("*", ""));
  EXPECT_FALSE(IdentityMatches("", "a"));
}

TEST(TenantsTest, ScopesAreOfOneLengthAndDiffer) {
  EXPECT_EQ(TenantScope(0).size(), kScopeBytes);
  EXPECT_EQ(TenantScope(262143).size(), kScopeBytes);
  EXPECT_NE(TenantScope(1), TenantScope(64));
  EXPECT_EQ(OwnNameBytes(TenantScope(5) + "name"), 4u);
  EXPECT_EQ(OwnNameBytes("name"), 4u);
}

}  // namespace
}  // namespace clusterkv::cache_service
