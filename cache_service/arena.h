// The page arena: all memory that grows with KV, allocated once at start.
//
// Fixed-size pages over one mapping. Pages are handed out in blocks (a block: all pages of one owner, one
// state) and every page is in exactly one state, which the ledger counts:
//
//   operation \ state   free      filling   ready      recalling   quarantined
//   Allocate            filling   -         -          -           -
//   PageBlock::Seal     -         ready     CHECK      CHECK       -
//   PageBlock::Pin      -         CHECK     recalling  recalling   -
//   last unpin          -         -         -          ready       -
//   ~PageBlock          -         free      free       CHECK       -
//   Quarantine          -         quarant.  quarant.   quarant.    -
//   ReleaseQuarantine   -         -         -          -           free
//
// free + filling + ready + recalling + quarantined = total, always.
// Reservations are promises of free pages to an owner; they are counted apart (reserved <= free).
//
// Thread-safe. Lock order: Arena's mutex is a leaf.
#ifndef CLUSTERKV_CACHE_SERVICE_ARENA_H_
#define CLUSTERKV_CACHE_SERVICE_ARENA_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"

namespace clusterkv::cache_service {

class Arena;

struct PageLedger {
  int64_t total = 0, free = 0, filling = 0, ready = 0, recalling = 0, quarantined = 0;
  int64_t reserved = 0;  // of the free ones
  bool Balanced() const {
    return free + filling + ready + recalling + quarantined == total && reserved <= free &&
           free >= 0 && filling >= 0 && ready >= 0 && recalling >= 0 && quarantined >= 0;
  }
};

// Pages promised to one owner. Move-only; what is left goes back when it dies.
class PageReservation {
 public:
  PageReservation() = default;
  PageReservation(PageReservation&&) noexcept;
  PageReservation& operator=(PageReservation&&) noexcept;
  ~PageReservation();
  int64_t pages() const { return pages_; }
  // Adds up to what is unreserved and free. Errors: ARENA_FULL.
  absl::Status Grow(int64_t pages);
  void Shrink(int64_t pages);

 private:
  friend class Arena;
  Arena* arena_ = nullptr;
  int64_t pages_ = 0;
};

// Pages of one owner. Move-only.
class PageBlock {
 public:
  PageBlock() = default;
  PageBlock(PageBlock&&) noexcept;
  PageBlock& operator=(PageBlock&&) noexcept;
  // REQUIRES: no pin is alive.
  ~PageBlock();

  absl::Span<const uint32_t> pages() const;  // in the order of their use
  // Contents are final: records the XXH3-64 of each page. REQUIRES: filling.
  void Seal();
  // Checks page `index` against what Seal recorded. Errors: CHECKSUM_MISMATCH. REQUIRES: sealed.
  absl::Status VerifyPage(int64_t index) const;

  // Keeps the block's pages in `recalling` while it lives. REQUIRES: sealed.
  class Pin {
   public:
    Pin() = default;
    Pin(Pin&&) noexcept;
    Pin& operator=(Pin&&) noexcept;
    ~Pin();

   private:
    friend class PageBlock;
    std::shared_ptr<struct PageBlockState> state_;
  };
  Pin MakePin() const;

 private:
  friend class Arena;
  std::shared_ptr<struct PageBlockState> state_;
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

  absl::StatusOr<PageReservation> Reserve(int64_t pages);
  // `pages` pages in state filling, taken out of `reservation` as far as it reaches, then out of the
  // unreserved free ones. reservation may be null. Errors: ARENA_FULL; nothing is taken then.
  absl::StatusOr<PageBlock> Allocate(int64_t pages, PageReservation* reservation);

  PageLedger ledger() const;

 private:
  friend class PageReservation;
  friend class PageBlock;
  friend struct PageBlockState;
  Arena() = default;
  std::byte* base_ = nullptr;
  int64_t page_bytes_ = 0, total_pages_ = 0;
  mutable absl::Mutex mutex_;
  std::vector<uint32_t> free_ ABSL_GUARDED_BY(mutex_);  // a stack
  PageLedger ledger_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_ARENA_H_
