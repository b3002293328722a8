// The arena's state table, its promises and a model-based fuzz test of all of it.
#include "cache_service/arena.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <utility>

#include "proto/error.h"
#include "tests/test_seed.h"

namespace clusterkv::cache_service {
namespace {

using ::testing::IsEmpty;

constexpr int64_t kPage = 4096;

std::unique_ptr<Arena> MakeArena(int64_t pages) {
  return Arena::Create(pages * kPage, kPage).value();
}

void Fill(Arena& arena, const PageBlock& block, int value) {
  for (uint32_t page : block.pages()) std::memset(arena.base() + page * kPage, value, kPage);
}

TEST(ArenaTest, RefusesSizesThatAreNoPages) {
  for (const auto& [bytes, page_bytes] :
       std::vector<std::pair<int64_t, int64_t>>{{1 << 20, 0},
                                                {1 << 20, 2048},
                                                {1 << 20, 4097},
                                                {1 << 20, 12288},
                                                {1 << 30, 4 << 20},
                                                {4095, 4096},
                                                {0, 4096},
                                                {-1, 4096},
                                                {int64_t{1} << 60, 4096}}) {
    EXPECT_EQ(Arena::Create(bytes, page_bytes).status().code(), absl::StatusCode::kInvalidArgument)
        << bytes << " " << page_bytes;
  }
}

TEST(ArenaTest, RoundsDownToPagesAndStartsFree) {
  const auto arena = Arena::Create(3 * kPage + kPage / 2, kPage).value();
  EXPECT_EQ(arena->total_pages(), 3);
  const PageLedger ledger = arena->ledger();
  EXPECT_EQ(ledger.free, 3);
  EXPECT_EQ(ledger.total, 3);
  EXPECT_TRUE(ledger.Balanced());
  EXPECT_THAT(arena->Audit(), IsEmpty());
}

TEST(ArenaTest, PagesBeyondTwoGigabytesAreTheirOwn) {
  const auto arena = Arena::Create(int64_t{5} << 30, 2 << 20).value();
  const PageBlock block = arena->Allocate(arena->total_pages(), nullptr).value();
  std::byte* first = arena->base() + int64_t{block.pages().front()} * arena->page_bytes();
  std::byte* last = arena->base() + int64_t{block.pages().back()} * arena->page_bytes();
  *first = std::byte{1};
  *last = std::byte{2};
  EXPECT_GT(std::abs(last - first), int64_t{1} << 31);
  EXPECT_EQ(*first, std::byte{1});
}

TEST(ArenaTest, BlockGoesThroughTheStateTable) {
  const auto arena = MakeArena(4);
  std::optional<PageBlock> block = arena->Allocate(2, nullptr).value();
  EXPECT_EQ(block->state(), PageState::kFilling);
  EXPECT_EQ(arena->ledger().filling, 2);
  block->Seal();
  EXPECT_EQ(block->state(), PageState::kReady);
  EXPECT_EQ(arena->ledger().ready, 2);
  {
    const PageBlock::Pin first = block->MakePin();
    EXPECT_EQ(block->state(), PageState::kRecalling);
    EXPECT_EQ(arena->ledger().recalling, 2);
    { const PageBlock::Pin second = block->MakePin(); }
    EXPECT_EQ(block->state(), PageState::kRecalling) << "one pin is left";
  }
  EXPECT_EQ(block->state(), PageState::kReady);
  block.reset();
  EXPECT_EQ(arena->ledger().free, 4);
  EXPECT_THAT(arena->Audit(), IsEmpty());
}

TEST(ArenaTest, FullArenaIsAnErrorWithNumbersAndTakesNothing) {
  const auto arena = MakeArena(4);
  const PageBlock block = arena->Allocate(3, nullptr).value();
  const absl::Status status = arena->Allocate(2, nullptr).status();
  EXPECT_EQ(ReasonOf(status), v1::ARENA_FULL);
  const ErrorMetadata metadata = MetadataOf(status);
  const std::map<std::string, std::string> values(metadata.begin(), metadata.end());
  EXPECT_EQ(values.at("neededPages"), "2");
  EXPECT_EQ(values.at("freePages"), "1");
  EXPECT_EQ(arena->ledger().free, 1);
}

TEST(ArenaTest, ReservedPagesAreKeptForTheirOwner) {
  const auto arena = MakeArena(4);
  PageReservation reservation = arena->Reserve(3).value();
  EXPECT_EQ(arena->ledger().reserved, 3);
  EXPECT_EQ(ReasonOf(arena->Allocate(2, nullptr).status()), v1::ARENA_FULL);
  const PageBlock stranger = arena->Allocate(1, nullptr).value();
  const PageBlock owner = arena->Allocate(2, &reservation).value();
  EXPECT_EQ(reservation.pages(), 1);
  EXPECT_EQ(ReasonOf(arena->Reserve(1).status()), v1::ARENA_FULL);
  EXPECT_EQ(ReasonOf(reservation.Grow(1)), v1::ARENA_FULL);
  reservation.Shrink(1);
  EXPECT_TRUE(reservation.Grow(1).ok());
}

TEST(ArenaTest, AllocationReachesBeyondItsReservation) {
  const auto arena = MakeArena(4);
  PageReservation reservation = arena->Reserve(2).value();
  const PageBlock block = arena->Allocate(4, &reservation).value();
  EXPECT_EQ(reservation.pages(), 0);
  EXPECT_EQ(arena->ledger().free, 0);
  EXPECT_TRUE(arena->ledger().Balanced());
}

TEST(ArenaTest, FreeingIntoAReservationKeepsThePromise) {
  const auto arena = MakeArena(4);
  PageReservation reservation = arena->Reserve(3).value();
  PageBlock block = arena->Allocate(4, &reservation).value();
  arena->Free(std::move(block), &reservation, 3);
  EXPECT_EQ(reservation.pages(), 3);
  EXPECT_EQ(arena->ledger().free, 4);
  EXPECT_EQ(arena->ledger().reserved, 3);
}

TEST(ArenaTest, ReservationsGoBackWhenTheyDieOrAreReplaced) {
  const auto arena = MakeArena(4);
  PageReservation first = arena->Reserve(2).value();
  first = arena->Reserve(1).value();
  EXPECT_EQ(arena->ledger().reserved, 1);
  { PageReservation moved = std::move(first); }
  EXPECT_EQ(arena->ledger().reserved, 0);
}

TEST(ArenaTest, ChecksumTellsAChangedByte) {
  const auto arena = MakeArena(4);
  PageBlock block = arena->Allocate(2, nullptr).value();
  Fill(*arena, block, 7);
  block.Seal();
  EXPECT_TRUE(block.VerifyPage(0).ok());
  EXPECT_TRUE(block.VerifyPage(1).ok());
  arena->base()[block.pages()[1] * kPage + kPage - 1] ^= std::byte{1};
  EXPECT_TRUE(block.VerifyPage(0).ok());
  EXPECT_EQ(ReasonOf(block.VerifyPage(1)), v1::CHECKSUM_MISMATCH);
}

TEST(ArenaTest, QuarantinedPagesStayOutOfUseUntilTheTicketIsGivenBack) {
  const auto arena = MakeArena(4);
  PageBlock filling = arena->Allocate(1, nullptr).value();
  const int64_t first = arena->Quarantine(std::move(filling));
  PageBlock sealed = arena->Allocate(2, nullptr).value();
  sealed.Seal();
  int64_t second = 0;
  {
    const PageBlock::Pin pin = sealed.MakePin();
    second = arena->Quarantine(std::move(sealed));
    EXPECT_EQ(arena->ledger().quarantined, 3);
  }
  EXPECT_EQ(arena->ledger().quarantined, 3) << "the last unpin changes nothing";
  EXPECT_EQ(ReasonOf(arena->Allocate(2, nullptr).status()), v1::ARENA_FULL);
  EXPECT_THAT(arena->Audit(), IsEmpty());
  arena->ReleaseQuarantine(first);
  arena->ReleaseQuarantine(second);
  EXPECT_EQ(arena->ledger().free, 4);
}

TEST(ArenaTest, EmptyBlocksAreBlocks) {
  const auto arena = MakeArena(1);
  PageBlock block = arena->Allocate(0, nullptr).value();
  EXPECT_FALSE(block.empty());
  EXPECT_TRUE(block.pages().empty());
  block.Seal();
  const PageBlock::Pin pin = block.MakePin();
  EXPECT_EQ(block.state(), PageState::kRecalling);
}

using ArenaDeathTest = ::testing::Test;

TEST(ArenaDeathTest, OnlyAFillingBlockIsSealed) {
  const auto arena = MakeArena(2);
  PageBlock block = arena->Allocate(1, nullptr).value();
  block.Seal();
  EXPECT_DEATH(block.Seal(), "only a filling block is sealed");
  const PageBlock::Pin pin = block.MakePin();
  EXPECT_DEATH(block.Seal(), "only a filling block is sealed");
}

TEST(ArenaDeathTest, OnlyASealedBlockIsPinnedOrVerified) {
  const auto arena = MakeArena(2);
  const PageBlock block = arena->Allocate(1, nullptr).value();
  EXPECT_DEATH(block.MakePin(), "only a sealed block is pinned");
  EXPECT_DEATH(block.VerifyPage(0).IgnoreError(), "only a sealed block can be verified");
}

TEST(ArenaDeathTest, BlockIsNotFreedUnderAPin) {
  const auto arena = MakeArena(2);
  std::optional<PageBlock> block = arena->Allocate(1, nullptr).value();
  block->Seal();
  const PageBlock::Pin pin = block->MakePin();
  EXPECT_DEATH(block.reset(), "freed under 1 pins");
}

TEST(ArenaDeathTest, TicketsAreGivenBackOnce) {
  const auto arena = MakeArena(2);
  const int64_t ticket = arena->Quarantine(arena->Allocate(1, nullptr).value());
  arena->ReleaseQuarantine(ticket);
  EXPECT_DEATH(arena->ReleaseQuarantine(ticket), "ticket");
}

TEST(ArenaDeathTest, ArenaOutlivesItsBlocksAndReservations) {
  EXPECT_DEATH(
      {
        auto arena = MakeArena(2);
        const PageBlock block = arena->Allocate(1, nullptr).value();
        arena.reset();
      },
      "died before");
  EXPECT_DEATH(
      {
        auto arena = MakeArena(2);
        const PageReservation reservation = arena->Reserve(1).value();
        arena.reset();
      },
      "died before");
}

// --- model-based fuzz: every operation is also done on counts that are easy to believe.

class ArenaModel {
 public:
  static constexpr int64_t kPages = 96;

  explicit ArenaModel(uint64_t seed) : random_(seed), arena_(MakeArena(kPages)) {}
  ~ArenaModel() {
    for (int64_t ticket : tickets_) arena_->ReleaseQuarantine(ticket);
    for (Owner& owner : owners_) owner.pins.clear();
  }

  void Step() {
    switch (Draw(17)) {
      case 0:
      case 1:
      case 2:
        return Allocate();
      case 3:
        return Reserve();
      case 4:
      case 14:
      case 15:
        return ChangeReservation();
      case 5:
      case 6:
        return Seal();
      case 7:
      case 8:
        return Pin();
      case 9:
      case 10:
        return Unpin();
      case 11:
        return FreeInto();
      case 12:
        return Quarantine();
      case 13:
        return ReleaseQuarantine();
      default:
        return Free();
    }
  }

  int64_t allocations() const { return allocations_; }

  void Check() const {
    PageLedger expected;
    expected.total = kPages;
    expected.quarantined = quarantined_;
    std::set<uint32_t> pages;
    int64_t held = quarantined_;
    for (const Owner& owner : owners_) {
      const int64_t size = static_cast<int64_t>(owner.block.pages().size());
      held += size;
      pages.insert(owner.block.pages().begin(), owner.block.pages().end());
      int64_t& count = !owner.sealed        ? expected.filling
                       : owner.pins.empty() ? expected.ready
                                            : expected.recalling;
      count += size;
    }
    ASSERT_EQ(static_cast<int64_t>(pages.size()), held - quarantined_) << "a page has two owners";
    expected.free = kPages - held;
    for (const Promise& promise : promises_) {
      expected.reserved += promise.pages;
      ASSERT_EQ(promise.reservation.pages(), promise.pages);
    }
    ASSERT_TRUE(arena_->ledger() == expected);
    ASSERT_TRUE(expected.Balanced());
    ASSERT_THAT(arena_->Audit(), IsEmpty());
  }

 private:
  struct Owner {
    PageBlock block;
    bool sealed = false;
    std::vector<PageBlock::Pin> pins;
  };
  struct Promise {
    PageReservation reservation;
    int64_t pages = 0;
  };

  int64_t Draw(int64_t end) { return std::uniform_int_distribution<int64_t>(0, end - 1)(random_); }
  int64_t Unreserved() const {
    const PageLedger ledger = arena_->ledger();
    return ledger.free - ledger.reserved;
  }
  Owner* AnyOwner() { return owners_.empty() ? nullptr : &owners_[Draw(owners_.size())]; }
  Promise* AnyPromise() { return promises_.empty() ? nullptr : &promises_[Draw(promises_.size())]; }

  void Allocate() {
    Promise* promise = Draw(2) == 0 ? AnyPromise() : nullptr;
    const int64_t pages = Draw(12);
    const int64_t promised = promise != nullptr ? std::min(promise->pages, pages) : 0;
    const bool fits = pages - promised <= Unreserved();
    auto block = arena_->Allocate(pages, promise != nullptr ? &promise->reservation : nullptr);
    ASSERT_EQ(block.ok(), fits) << block.status();
    if (!fits) return;
    if (promise != nullptr) promise->pages -= promised;
    owners_.push_back({std::move(*block), false, {}});
    ++allocations_;
  }

  void Reserve() {
    const int64_t pages = Draw(16);
    const bool fits = pages <= Unreserved();
    auto reservation = arena_->Reserve(pages);
    ASSERT_EQ(reservation.ok(), fits);
    if (fits) promises_.push_back({std::move(*reservation), pages});
  }

  void ChangeReservation() {
    Promise* promise = AnyPromise();
    if (promise == nullptr) return;
    const int64_t pages = Draw(8);
    switch (Draw(3)) {
      case 0: {
        const bool fits = pages <= Unreserved();
        ASSERT_EQ(promise->reservation.Grow(pages).ok(), fits);
        if (fits) promise->pages += pages;
        return;
      }
      case 1: {
        const int64_t given = std::min(pages, promise->pages);
        promise->reservation.Shrink(given);
        promise->pages -= given;
        return;
      }
      default:
        std::swap(*promise, promises_.back());
        promises_.pop_back();
    }
  }

  void Seal() {
    Owner* owner = AnyOwner();
    if (owner == nullptr || owner->sealed) return;
    owner->block.Seal();
    owner->sealed = true;
  }

  void Pin() {
    Owner* owner = AnyOwner();
    if (owner == nullptr || !owner->sealed) return;
    owner->pins.push_back(owner->block.MakePin());
  }

  void Unpin() {
    Owner* owner = AnyOwner();
    if (owner == nullptr || owner->pins.empty()) return;
    std::swap(owner->pins[Draw(owner->pins.size())], owner->pins.back());
    owner->pins.pop_back();
  }

  void Drop(Owner* owner) {
    if (owner != &owners_.back()) std::swap(*owner, owners_.back());
    owners_.pop_back();
  }

  void Free() {
    Owner* owner = AnyOwner();
    if (owner == nullptr || !owner->pins.empty()) return;
    Drop(owner);
  }

  void FreeInto() {
    Owner* owner = AnyOwner();
    Promise* promise = AnyPromise();
    if (owner == nullptr || promise == nullptr || !owner->pins.empty()) return;
    const int64_t keep = Draw(8);
    promise->pages += std::min(keep, static_cast<int64_t>(owner->block.pages().size()));
    arena_->Free(std::move(owner->block), &promise->reservation, keep);
    Drop(owner);
  }

  void Quarantine() {
    Owner* owner = AnyOwner();
    if (owner == nullptr || tickets_.size() > 3) return;
    const int64_t size = static_cast<int64_t>(owner->block.pages().size());
    tickets_.push_back(arena_->Quarantine(std::move(owner->block)));
    quarantined_ += size;
    sizes_.push_back(size);
    Drop(owner);  // its pins die with it, after the block
  }

  void ReleaseQuarantine() {
    if (tickets_.empty()) return;
    arena_->ReleaseQuarantine(tickets_.back());
    quarantined_ -= sizes_.back();
    tickets_.pop_back();
    sizes_.pop_back();
  }

  std::mt19937_64 random_;
  std::unique_ptr<Arena> arena_;
  std::vector<Owner> owners_;
  std::vector<Promise> promises_;
  std::vector<int64_t> tickets_, sizes_;
  int64_t quarantined_ = 0, allocations_ = 0;
};

TEST(ArenaFuzzTest, AMillionOperationsAgreeWithTheModel) {
  const uint64_t seed = TestSeed(20240607);
  ArenaModel model(seed);
  for (int64_t i = 0; i < kFuzzOperations; ++i) {
    model.Step();
    if (i % 97 == 0) model.Check();
    if (::testing::Test::HasFatalFailure()) FAIL() << "operation " << i << ", seed " << seed;
  }
  model.Check();
  EXPECT_GT(model.allocations(), kFuzzOperations / 20) << "the arena was full most of the time";
}

}  // namespace
}  // namespace clusterkv::cache_service
