// Who runs beside whom, with ends that only note what they were told.
#include "cache_service/residents.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <utility>
#include <vector>

namespace clusterkv::cache_service {
namespace {

constexpr int kMultiprocessors = 132;

class NotingEnd : public ResidentEnd {
 public:
  explicit NotingEnd(int pairs) : pairs_(pairs) {}
  ResidentRound round() const override { return {pairs_}; }
  absl::Status Start(const ResidentPlace& place, const std::vector<ResidentEnd*>& others) override {
    if (first_ != nullptr) return absl::OkStatus();
    std::vector<NotingEnd*> all = {this};
    for (ResidentEnd* other : others) all.push_back(static_cast<NotingEnd*>(other));
    for (const NotingEnd* end : all) {
      if (!end->start_.ok()) return end->start_;
    }
    for (NotingEnd* end : all) end->first_ = this;
    blocks_ = place.blocks();
    return absl::OkStatus();
  }
  absl::Status Stop() override {
    first_ = nullptr;
    return absl::OkStatus();
  }
  int blocks() const { return first_ == nullptr ? 0 : first_->blocks_; }  // 0: stopped
  const NotingEnd* first() const { return first_; }                       // of its kernel
  void FailToStart() { start_ = absl::InternalError("no"); }

 private:
  const int pairs_;
  int blocks_ = 0;
  NotingEnd* first_ = nullptr;
  absl::Status start_;
};

class ResidentsTest : public ::testing::Test {
 protected:
  absl::Status Add(NotingEnd& end) {
    const Residents::Pause pause(&residents_);
    absl::Status room = residents_.CheckRoom();
    return room.ok() ? residents_.Add(&end) : room;
  }
  void Remove(NotingEnd& end) {
    const Residents::Pause pause(&residents_);
    residents_.Remove(&end);
  }
  int BlocksPerPair(int pairs) {
    return residents_.LaunchSelect({pairs}, [](int blocks) { return blocks; });
  }

  Residents residents_{kMultiprocessors};
};

TEST_F(ResidentsTest, SharesAreEqualAndGrowWhenOneGoes) {
  NotingEnd a(8), b(8), c(8);
  ASSERT_TRUE(Add(a).ok() && Add(b).ok());
  EXPECT_NE(a.first(), b.first());
  const int of_two = a.blocks();
  EXPECT_EQ(b.blocks(), of_two);
  ASSERT_TRUE(Add(c).ok());
  EXPECT_LT(a.blocks(), of_two);
  Remove(c);
  EXPECT_EQ(a.blocks(), of_two);
  EXPECT_EQ(c.blocks(), 0);
}

TEST_F(ResidentsTest, OneKernelServesWhatDoesNotFitBesideEachOther) {
  NotingEnd a(128), b(128);
  ASSERT_TRUE(Add(a).ok());
  EXPECT_EQ(a.blocks(), 128);
  const int beside_one = BlocksPerPair(1);
  ASSERT_TRUE(Add(b).ok());
  EXPECT_EQ(a.first(), &a);
  EXPECT_EQ(b.first(), &a);
  EXPECT_EQ(a.blocks(), 128);
  EXPECT_EQ(BlocksPerPair(1), beside_one);
  Remove(a);
  EXPECT_EQ(a.first(), nullptr);
  EXPECT_EQ(b.first(), &b);
  EXPECT_EQ(b.blocks(), 128);
}

TEST_F(ResidentsTest, AllStandStillDuringAPause) {
  NotingEnd a(8), b(8);
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
  NotingEnd a(64), b(64);
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
  NotingEnd end(8);
  {
    absl::StatusOr<Residents::NcclPlace> place = residents_.TakeNcclPlace();
    ASSERT_TRUE(place.ok());
    const Residents::NcclPlace moved = *std::move(place);
    EXPECT_TRUE(absl::IsUnavailable(Add(end)));
  }
  ASSERT_TRUE(Add(end).ok());
  EXPECT_TRUE(absl::IsUnavailable(residents_.TakeNcclPlace().status()));
  Remove(end);
  EXPECT_TRUE(residents_.TakeNcclPlace().ok());
}

TEST_F(ResidentsTest, OneThatDoesNotStartIsNotAdded) {
  NotingEnd a(128), b(128);
  ASSERT_TRUE(Add(a).ok());
  b.FailToStart();
  EXPECT_TRUE(absl::IsInternal(Add(b)));
  EXPECT_EQ(a.blocks(), 128);
}

TEST_F(ResidentsTest, NoMoreGroupsThanHavePlaces) {
  std::vector<std::unique_ptr<NotingEnd>> ends;
  for (int i = 0; i < MaxResidentGroups(kMultiprocessors); ++i) {
    ASSERT_TRUE(Add(*ends.emplace_back(std::make_unique<NotingEnd>(8))).ok());
  }
  NotingEnd last(8);
  EXPECT_TRUE(absl::IsResourceExhausted(Add(last)));
}

}  // namespace
}  // namespace clusterkv::cache_service
