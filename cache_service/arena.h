// The page arena: all memory that grows with KV, allocated once at start.
//
// Fixed-size pages over one mapping. Pages are handed out in blocks (a block: all pages of one
// owner, one state) and every page is in exactly one state, which the ledger counts:
//
//   operation \ state   free      filling   ready      recalling   quarantined
//   Allocate            filling   -         -          -           -
//   PageBlock::Seal     -         ready     CHECK      CHECK       CHECK
//   PageBlock::MakePin  -         CHECK     recalling  recalling   CHECK
//   last unpin          -         -         -          ready       quarantined
//   ~PageBlock, Free    -         free      free       CHECK       -
//   Quarantine          -         quarant.  quarant.   quarant.    CHECK
//   ReleaseQuarantine   -         -         -          -           free (CHECK: no pin)
//
// free + filling + ready + recalling + quarantined = total, always.
// Reservations are promises of free pages to an owner; they are counted apart (reserved <= free).
//
// Thread-safe, as are reservations; a block has one owner at a time, its pins any. Lock order:
// Arena's mutex is a leaf.
#ifndef CLUSTERKV_CACHE_SERVICE_ARENA_H_
#define CLUSTERKV_CACHE_SERVICE_ARENA_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"

namespace clusterkv::cache_service {

class Arena;
struct PageBlockState;

struct PageLedger {
  int64_t total = 0, free = 0, filling = 0, ready = 0, recalling = 0, quarantined = 0;
  int64_t reserved = 0;  // of the free ones
  bool Balanced() const {
    return free + filling + ready + recalling + quarantined == total && reserved <= free &&
           free >= 0 && filling >= 0 && ready >= 0 && recalling >= 0 && quarantined >= 0;
  }
  bool operator==(const PageLedger&) const = default;
};

enum class PageState : uint8_t { kFilling = 1, kReady, kRecalling, kQuarantined };

// Pages promised to one owner. Move-only; what is left goes back when it dies.
class PageReservation {
 public:
  PageReservation() = default;
  PageReservation(PageReservation&&) noexcept;
  PageReservation& operator=(PageReservation&&) noexcept;
  ~PageReservation();
  int64_t pages() const;
  // Adds up to what is unreserved and free. Errors: ARENA_FULL.
  // REQUIRES: made by Arena::Reserve.
  absl::Status Grow(int64_t pages);
  // Gives `pages` of what is left back; REQUIRES: pages() >= pages.
  void Shrink(int64_t pages);

 private:
  friend class Arena;
  Arena* arena_ = nullptr;
  int64_t pages_ = 0;  // under the arena's mutex
};

// Pages of one owner. Move-only.
class PageBlock {
 public:
  PageBlock() = default;
  PageBlock(PageBlock&&) noexcept = default;
  PageBlock& operator=(PageBlock&&) noexcept;
  // REQUIRES: no pin is alive.
  ~PageBlock();

  bool empty() const { return state_ == nullptr; }
  absl::Span<const uint32_t> pages() const;  // in the order of their use
  // REQUIRES: not empty.
  PageState state() const;
  // Contents are final: records the XXH3-64 of each page. REQUIRES: filling.
  void Seal();
  // Checks page `index` against what Seal recorded. Errors: CHECKSUM_MISMATCH. REQUIRES: sealed.
  absl::Status VerifyPage(int64_t index) const;

  // Keeps the block's pages in `recalling` while it lives. REQUIRES: sealed.
  class Pin {
   public:
    Pin() = default;
    Pin(Pin&&) noexcept = default;
    Pin& operator=(Pin&&) noexcept;
    ~Pin();

   private:
    friend class PageBlock;
    std::shared_ptr<PageBlockState> state_;
  };
  Pin MakePin() const;

 private:
  friend class Arena;
  std::shared_ptr<PageBlockState> state_;
};

class Arena {
 public:
  // Maps arena_bytes, rounded down to pages. page_bytes: a power of two, 4 KiB to 2 MiB.
  // Errors: InvalidArgument for sizes; ResourceExhausted when the mapping fails.
  static absl::StatusOr<std::unique_ptr<Arena>> Create(int64_t arena_bytes, int64_t page_bytes);
  virtual ~Arena();  // REQUIRES: no block, pin or reservation is alive

  std::byte* base() const { return base_; }
  int64_t page_bytes() const { return page_bytes_; }
  int64_t total_pages() const { return total_pages_; }

  // Errors: ARENA_FULL with neededPages, freePages, reservedPages, totalPages; InvalidArgument for
  // pages < 0.
  absl::StatusOr<PageReservation> Reserve(int64_t pages);
  // Moves `pages` of what `from` was promised to a reservation of its own.
  // REQUIRES: 0 <= pages <= from.pages().
  PageReservation Split(PageReservation& from, int64_t pages);
  // `pages` pages in state filling, taken out of `reservation` as far as it reaches, then out of
  // the unreserved free ones. reservation may be null. Errors: as Reserve; nothing is taken then.
  absl::StatusOr<PageBlock> Allocate(int64_t pages, PageReservation* reservation);
  // Frees the block and, in the same step, promises up to `keep` of its pages to `reservation`
  // (may be null, and then keeps none). REQUIRES: no pin is alive.
  void Free(PageBlock block, PageReservation* reservation, int64_t keep);

  // Keeps the block's pages from every further use, pinned or not, until the ticket is given back.
  int64_t Quarantine(PageBlock block);
  // REQUIRES: a ticket of Quarantine, once; no pin is alive.
  void ReleaseQuarantine(int64_t ticket);

  PageLedger ledger() const;
  // Recounts every page from the free stack and the blocks that are alive, and says what is wrong:
  // a page in two places or in none, or a count other than the ledger's. Empty: all is well.
  // What was counted goes to *counted, if that is not null.
  std::vector<std::string> Audit(PageLedger* counted = nullptr) const;
  // Counts operations that change the ledger: equal before and after means that nothing moved.
  int64_t changes() const;

 private:
  friend class PageReservation;
  friend class PageBlock;
  Arena() = default;

  absl::Status TakeReserved(int64_t pages, PageReservation* reservation)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void FreeLocked(PageBlockState& state) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Move(PageBlockState& state, PageState to) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  int64_t& Count(PageState state) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status Full(int64_t pages) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  std::byte* base_ = nullptr;
  int64_t page_bytes_ = 0, total_pages_ = 0;
  mutable absl::Mutex mutex_;
  std::vector<uint32_t> free_ ABSL_GUARDED_BY(mutex_);  // a stack
  PageLedger ledger_ ABSL_GUARDED_BY(mutex_);
  PageBlockState* blocks_ ABSL_GUARDED_BY(mutex_) = nullptr;  // all that are alive, a list
  absl::flat_hash_map<int64_t, std::shared_ptr<PageBlockState>> quarantine_ ABSL_GUARDED_BY(mutex_);
  int64_t next_ticket_ ABSL_GUARDED_BY(mutex_) = 1;
  int64_t changes_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_ARENA_H_
