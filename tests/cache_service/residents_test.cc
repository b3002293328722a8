// Who runs beside whom, with kernels that only note what they were told.
#include "cache_service/residents.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <utility>
#include <vector>

namespace clusterkv::cache_service {
namespace {

constexpr int kMultiprocessors = 132;

class NotingKernel : public ResidentKernel {
 public:
  explicit NotingKernel(int pairs) : pairs_(pairs) {}
  int pairs() const override { return pairs_; }
  absl::Status Start(const ResidentPlace& place) override {
    if (!start_.ok()) return start_;
    if (blocks_ == 0) blocks_ = place.blocks();
    return absl::OkStatus();
  }
  absl::Status Stop() override {
    blocks_ = 0;
    return absl::OkStatus();
  }
  int blocks() const { return blocks_; }  // 0: stopped
  void FailToStart() { start_ = absl::InternalError("no"); }

 private:
  const int pairs_;
  int blocks_ = 0;
  absl::Status start_;
};

class ResidentsTest : public ::testing::Test {
 protected:
  absl::Status Add(NotingKernel& kernel) {
    const Residents::Pause pause(&residents_);
    absl::Status room = residents_.CheckRoom();
    return room.ok() ? residents_.Add(&kernel) : room;
  }
  void Remove(NotingKernel& kernel) {
    const Residents::Pause pause(&residents_);
    residents_.Remove(&kernel);
  }
  int BlocksPerPair(int pairs) {
    return residents_.LaunchSelect(pairs, [](int blocks) { return blocks; });
  }

  Residents residents_{kMultiprocessors};
};

TEST_F(ResidentsTest, SharesAreEqualAndGrowWhenOneGoes) {
  NotingKernel a(128), b(128);
  ASSERT_TRUE(Add(a).ok());
  EXPECT_EQ(a.blocks(), 128);
  ASSERT_TRUE(Add(b).ok());
  EXPECT_EQ(a.blocks(), 64);
  EXPECT_EQ(b.blocks(), 64);
  Remove(b);
  EXPECT_EQ(a.blocks(), 128);
  EXPECT_EQ(b.blocks(), 0);
}

TEST_F(ResidentsTest, AllStandStillDuringAPause) {
  NotingKernel a(8), b(8);
  ASSERT_TRUE(Add(a).ok() && Add(b).ok());
  {
    const Residents::Pause pause(&residents_);
    EXPECT_EQ(a.blocks() + b.blocks(), 0);
  }
  EXPECT_GT(a.blocks(), 0);
  EXPECT_GT(b.blocks(), 0);
}

TEST_F(ResidentsTest, SelectsAskForFewerBlocksBesideGroups) {
  EXPECT_EQ(BlocksPerPair(8), 0);
  NotingKernel a(66), b(66);
  ASSERT_TRUE(Add(a).ok());
  const int beside_one = BlocksPerPair(8);
  EXPECT_GT(beside_one, 0);
  ASSERT_TRUE(Add(b).ok());
  EXPECT_LT(BlocksPerPair(8), beside_one);
  Remove(a);
  Remove(b);
  EXPECT_EQ(BlocksPerPair(8), 0);
}

TEST_F(ResidentsTest, NcclAndGroupsExcludeEachOther) {
  NotingKernel kernel(8);
  {
    absl::StatusOr<Residents::NcclPlace> place = residents_.TakeNcclPlace();
    ASSERT_TRUE(place.ok());
    const Residents::NcclPlace moved = *std::move(place);
    EXPECT_TRUE(absl::IsUnavailable(Add(kernel)));
  }
  ASSERT_TRUE(Add(kernel).ok());
  EXPECT_TRUE(absl::IsUnavailable(residents_.TakeNcclPlace().status()));
  Remove(kernel);
  EXPECT_TRUE(residents_.TakeNcclPlace().ok());
}

TEST_F(ResidentsTest, OneThatDoesNotStartIsNotAdded) {
  NotingKernel a(128), b(128);
  ASSERT_TRUE(Add(a).ok());
  b.FailToStart();
  EXPECT_TRUE(absl::IsInternal(Add(b)));
  EXPECT_EQ(a.blocks(), 128);
}

TEST_F(ResidentsTest, NoMoreGroupsThanHavePlaces) {
  std::vector<std::unique_ptr<NotingKernel>> kernels;
  for (int i = 0; i < MaxResidentGroups(kMultiprocessors); ++i) {
    ASSERT_TRUE(Add(*kernels.emplace_back(std::make_unique<NotingKernel>(8))).ok());
  }
  NotingKernel last(8);
  EXPECT_TRUE(absl::IsResourceExhausted(Add(last)));
}

}  // namespace
}  // namespace clusterkv::cache_service
