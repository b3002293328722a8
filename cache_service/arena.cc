#include "cache_service/arena.h"

#include <sys/mman.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "proto/error.h"

namespace clusterkv::cache_service {

// Everything but `pages` and `checksums` is under the arena's mutex. `pages` never changes while
// the block lives; `checksums` is written by Seal alone, before which nobody else reads the block.
struct PageBlockState {
  Arena* arena = nullptr;
  std::vector<uint32_t> pages;
  std::vector<uint64_t> checksums;  // [pages] after Seal
  PageState state = PageState::kFilling;
  int64_t pins = 0;
  PageBlockState* previous = nullptr;
  PageBlockState* next = nullptr;

  int64_t size() const { return static_cast<int64_t>(pages.size()); }
};

namespace {

constexpr int64_t kMinPageBytes = 4 << 10, kMaxPageBytes = 2 << 20;

uint64_t PageChecksum(const Arena& arena, uint32_t page) {
  return XXH3_64bits(arena.base() + static_cast<int64_t>(page) * arena.page_bytes(),
                     static_cast<size_t>(arena.page_bytes()));
}

}  // namespace

// --- PageReservation

PageReservation::PageReservation(PageReservation&& other) noexcept
    : arena_(std::exchange(other.arena_, nullptr)), pages_(std::exchange(other.pages_, 0)) {}

PageReservation& PageReservation::operator=(PageReservation&& other) noexcept {
  if (this == &other) return *this;
  if (arena_ != nullptr) Shrink(pages());
  arena_ = std::exchange(other.arena_, nullptr);
  pages_ = std::exchange(other.pages_, 0);
  return *this;
}

PageReservation::~PageReservation() {
  if (arena_ != nullptr) Shrink(pages());
}

int64_t PageReservation::pages() const {
  if (arena_ == nullptr) return 0;
  absl::MutexLock lock(&arena_->mutex_);
  return pages_;
}

absl::Status PageReservation::Grow(int64_t pages) {
  CKV_CHECK(arena_ != nullptr && pages >= 0) << pages;
  absl::MutexLock lock(&arena_->mutex_);
  if (arena_->ledger_.free - arena_->ledger_.reserved < pages) return arena_->Full(pages);
  arena_->ledger_.reserved += pages;
  ++arena_->changes_;
  pages_ += pages;
  return absl::OkStatus();
}

void PageReservation::Shrink(int64_t pages) {
  if (arena_ == nullptr) {
    CKV_CHECK(pages == 0) << pages;
    return;
  }
  absl::MutexLock lock(&arena_->mutex_);
  CKV_CHECK(pages >= 0 && pages <= pages_) << pages << " of " << pages_;
  arena_->ledger_.reserved -= pages;
  ++arena_->changes_;
  pages_ -= pages;
}

// --- PageBlock

PageBlock& PageBlock::operator=(PageBlock&& other) noexcept {
  if (this == &other) return *this;
  if (state_ != nullptr) {
    Arena* arena = state_->arena;
    arena->Free(std::move(*this), nullptr, 0);
  }
  state_ = std::move(other.state_);
  return *this;
}

PageBlock::~PageBlock() {
  if (state_ == nullptr) return;
  Arena* arena = state_->arena;
  absl::MutexLock lock(&arena->mutex_);
  arena->FreeLocked(*state_);
}

absl::Span<const uint32_t> PageBlock::pages() const {
  if (state_ == nullptr) return {};
  return state_->pages;
}

PageState PageBlock::state() const {
  CKV_CHECK(state_ != nullptr);
  absl::MutexLock lock(&state_->arena->mutex_);
  return state_->state;
}

void PageBlock::Seal() {
  CKV_CHECK(state_ != nullptr);
  CKV_CHECK(state() == PageState::kFilling) << "only a filling block is sealed";
  std::vector<uint64_t> checksums;
  checksums.reserve(state_->pages.size());
  for (uint32_t page : state_->pages) checksums.push_back(PageChecksum(*state_->arena, page));
  absl::MutexLock lock(&state_->arena->mutex_);
  state_->checksums = std::move(checksums);
  state_->arena->Move(*state_, PageState::kReady);
}

absl::Status PageBlock::VerifyPage(int64_t index) const {
  CKV_CHECK(state_ != nullptr && state_->checksums.size() == state_->pages.size())
      << "only a sealed block can be verified";
  CKV_CHECK(index >= 0 && index < state_->size()) << index << " of " << state_->size();
  const uint32_t page = state_->pages[static_cast<size_t>(index)];
  const uint64_t expected = state_->checksums[static_cast<size_t>(index)];
  const uint64_t got = PageChecksum(*state_->arena, page);
  if (got == expected) return absl::OkStatus();
  return Error(v1::CHECKSUM_MISMATCH,
               absl::StrCat("page ", page, ": expected checksum ", absl::Hex(expected), ", got ",
                            absl::Hex(got)),
               {{"page", absl::StrCat(page)}});
}

PageBlock::Pin PageBlock::MakePin() const {
  CKV_CHECK(state_ != nullptr);
  Pin pin;
  {
    absl::MutexLock lock(&state_->arena->mutex_);
    CKV_CHECK(state_->state == PageState::kReady || state_->state == PageState::kRecalling)
        << "only a sealed block is pinned";
    if (state_->pins++ == 0) state_->arena->Move(*state_, PageState::kRecalling);
  }
  pin.state_ = state_;
  return pin;
}

PageBlock::Pin& PageBlock::Pin::operator=(Pin&& other) noexcept {
  if (this == &other) return *this;
  Pin dropped;
  dropped.state_ = std::move(state_);
  state_ = std::move(other.state_);
  return *this;
}

PageBlock::Pin::~Pin() {
  if (state_ == nullptr) return;
  Arena* arena = state_->arena;
  absl::MutexLock lock(&arena->mutex_);
  if (--state_->pins == 0 && state_->state == PageState::kRecalling) {
    arena->Move(*state_, PageState::kReady);
  }
}

// --- Arena

absl::StatusOr<std::unique_ptr<Arena>> Arena::Create(int64_t arena_bytes, int64_t page_bytes) {
  if (page_bytes < kMinPageBytes || page_bytes > kMaxPageBytes ||
      (page_bytes & (page_bytes - 1)) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("page_bytes: expected a power of two from 4096 to 2097152, got ", page_bytes));
  }
  const int64_t pages = arena_bytes / page_bytes;
  if (pages < 1 || pages > int64_t{UINT32_MAX}) {
    return absl::InvalidArgumentError(absl::StrCat("arena_bytes: expected 1 to ", UINT32_MAX,
                                                   " pages of ", page_bytes, " bytes, got ",
                                                   arena_bytes, " bytes"));
  }
  // Pages of memory come with their first use: a server that holds little is small.
  void* base = mmap(nullptr, static_cast<size_t>(pages * page_bytes), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat("arena_bytes: mapping ", arena_bytes, " bytes: ", std::strerror(errno)));
  }
#ifdef MADV_HUGEPAGE
  // Selects jump from page to page: with huge pages they take about a tenth less time
  // (select_bench). Only advice: a kernel without them serves as well.
  madvise(base, static_cast<size_t>(pages * page_bytes), MADV_HUGEPAGE);
#endif
  auto arena = std::unique_ptr<Arena>(new Arena);
  arena->base_ = static_cast<std::byte*>(base);
  arena->page_bytes_ = page_bytes;
  arena->total_pages_ = pages;
  absl::MutexLock lock(&arena->mutex_);
  arena->free_.resize(static_cast<size_t>(pages));
  for (int64_t i = 0; i < pages; ++i) {  // the lowest page on top
    arena->free_[static_cast<size_t>(i)] = static_cast<uint32_t>(pages - 1 - i);
  }
  arena->ledger_.total = arena->ledger_.free = pages;
  return arena;
}

Arena::~Arena() {
  if (base_ == nullptr) return;
  absl::MutexLock lock(&mutex_);
  CKV_CHECK(blocks_ == nullptr && ledger_.reserved == 0)
      << "the arena died before its blocks and reservations";
  munmap(base_, static_cast<size_t>(total_pages_ * page_bytes_));
}

absl::Status Arena::Full(int64_t pages) const {
  return Error(v1::ARENA_FULL,
               absl::StrCat("the arena has no room: needed ", pages, " pages, free ", ledger_.free,
                            ", of these reserved ", ledger_.reserved, ", of ", ledger_.total),
               {{"neededPages", absl::StrCat(pages)},
                {"freePages", absl::StrCat(ledger_.free)},
                {"reservedPages", absl::StrCat(ledger_.reserved)},
                {"totalPages", absl::StrCat(ledger_.total)}});
}

absl::StatusOr<PageReservation> Arena::Reserve(int64_t pages) {
  if (pages < 0) {
    return absl::InvalidArgumentError(absl::StrCat("pages: expected 0 or more, got ", pages));
  }
  PageReservation reservation;
  absl::MutexLock lock(&mutex_);
  if (ledger_.free - ledger_.reserved < pages) return Full(pages);
  ledger_.reserved += pages;
  ++changes_;
  reservation.arena_ = this;
  reservation.pages_ = pages;
  return reservation;
}

PageReservation Arena::Split(PageReservation& from, int64_t pages) {
  PageReservation reservation;
  absl::MutexLock lock(&mutex_);
  CKV_CHECK(from.arena_ == this && pages >= 0 && pages <= from.pages_) << pages;
  from.pages_ -= pages;
  reservation.arena_ = this;
  reservation.pages_ = pages;
  return reservation;
}

absl::Status Arena::TakeReserved(int64_t pages, PageReservation* reservation) {
  const bool ours = reservation != nullptr && reservation->arena_ == this;
  const int64_t promised = ours ? std::min(pages, reservation->pages_) : 0;
  if (ledger_.free - ledger_.reserved < pages - promised) return Full(pages);
  if (ours) reservation->pages_ -= promised;
  ledger_.reserved -= promised;
  return absl::OkStatus();
}

absl::StatusOr<PageBlock> Arena::Allocate(int64_t pages, PageReservation* reservation) {
  if (pages < 0) {
    return absl::InvalidArgumentError(absl::StrCat("pages: expected 0 or more, got ", pages));
  }
  auto state = std::make_shared<PageBlockState>();
  state->arena = this;
  state->pages.reserve(static_cast<size_t>(std::min(pages, total_pages_)));
  PageBlock block;
  {
    absl::MutexLock lock(&mutex_);
    if (absl::Status status = TakeReserved(pages, reservation); !status.ok()) return status;
    const auto top = free_.end() - pages;
    state->pages.assign(std::make_reverse_iterator(free_.end()), std::make_reverse_iterator(top));
    free_.erase(top, free_.end());
    ledger_.free -= pages;
    ledger_.filling += pages;
    ++changes_;
    state->next = blocks_;
    if (blocks_ != nullptr) blocks_->previous = state.get();
    blocks_ = state.get();
  }
  block.state_ = std::move(state);
  return block;
}

void Arena::Free(PageBlock block, PageReservation* reservation, int64_t keep) {
  if (block.state_ == nullptr) return;
  const std::shared_ptr<PageBlockState> state = std::move(block.state_);
  absl::MutexLock lock(&mutex_);
  FreeLocked(*state);
  if (reservation == nullptr || reservation->arena_ != this) return;
  const int64_t kept = std::clamp<int64_t>(keep, 0, state->size());
  reservation->pages_ += kept;
  ledger_.reserved += kept;
}

void Arena::FreeLocked(PageBlockState& state) {
  CKV_CHECK(state.pins == 0) << "a block was freed under " << state.pins << " pins";
  Count(state.state) -= state.size();
  ledger_.free += state.size();
  ++changes_;
  free_.insert(free_.end(), state.pages.rbegin(), state.pages.rend());
  if (state.previous != nullptr) state.previous->next = state.next;
  if (state.next != nullptr) state.next->previous = state.previous;
  if (blocks_ == &state) blocks_ = state.next;
}

int64_t Arena::Quarantine(PageBlock block) {
  CKV_CHECK(block.state_ != nullptr);
  absl::MutexLock lock(&mutex_);
  Move(*block.state_, PageState::kQuarantined);
  const int64_t ticket = next_ticket_++;
  quarantine_.emplace(ticket, std::move(block.state_));
  return ticket;
}

void Arena::ReleaseQuarantine(int64_t ticket) {
  absl::MutexLock lock(&mutex_);
  const auto it = quarantine_.find(ticket);
  CKV_CHECK(it != quarantine_.end()) << "ticket " << ticket;
  FreeLocked(*it->second);
  quarantine_.erase(it);
}

void Arena::Move(PageBlockState& state, PageState to) {
  Count(state.state) -= state.size();
  Count(to) += state.size();
  ++changes_;
  state.state = to;
}

int64_t& Arena::Count(PageState state) {
  switch (state) {
    case PageState::kFilling:
      return ledger_.filling;
    case PageState::kReady:
      return ledger_.ready;
    case PageState::kRecalling:
      return ledger_.recalling;
    case PageState::kQuarantined:
      return ledger_.quarantined;
  }
  CKV_CHECK(false) << static_cast<int>(state);
  return ledger_.total;
}

PageLedger Arena::ledger() const {
  absl::MutexLock lock(&mutex_);
  return ledger_;
}

int64_t Arena::changes() const {
  absl::MutexLock lock(&mutex_);
  return changes_;
}

std::vector<std::string> Arena::Audit(PageLedger* counted_out) const {
  std::vector<std::string> problems;
  std::vector<uint8_t> seen(static_cast<size_t>(total_pages_), 0);
  absl::MutexLock lock(&mutex_);
  const auto see = [&](uint32_t page) {
    if (page >= seen.size()) {
      problems.push_back(absl::StrCat("page ", page, " is outside the arena"));
    } else if (seen[page]++ != 0) {
      problems.push_back(absl::StrCat("page ", page, " is in two places"));
    }
  };
  PageLedger counted;
  counted.total = total_pages_;
  counted.reserved = ledger_.reserved;
  for (uint32_t page : free_) see(page);
  counted.free = static_cast<int64_t>(free_.size());
  for (const PageBlockState* block = blocks_; block != nullptr; block = block->next) {
    for (uint32_t page : block->pages) see(page);
    const bool pinned = block->state == PageState::kRecalling;
    if (pinned != (block->pins > 0) && block->state != PageState::kQuarantined) {
      problems.push_back(absl::StrCat("a block with ", block->pins, " pins is in a wrong state"));
    }
    switch (block->state) {
      case PageState::kFilling:
        counted.filling += block->size();
        break;
      case PageState::kReady:
        counted.ready += block->size();
        break;
      case PageState::kRecalling:
        counted.recalling += block->size();
        break;
      case PageState::kQuarantined:
        counted.quarantined += block->size();
        break;
    }
  }
  if (counted_out != nullptr) *counted_out = counted;
  const int64_t lost = std::count(seen.begin(), seen.end(), 0);
  if (lost != 0) problems.push_back(absl::StrCat(lost, " pages are nowhere"));
  if (!(counted == ledger_) || !ledger_.Balanced()) {
    problems.push_back("the ledger's counts are not those of the pages");
  }
  return problems;
}

}  // namespace clusterkv::cache_service
