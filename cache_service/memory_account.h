// What one sequence was promised of the arena, by use.
//
// At open a sequence is promised all that it needs to become READY and to take its decoded tokens,
// so that nothing it does later fails for memory that somebody else took. Freed memory of a use
// goes back to that use's promise, up to what was promised at first: the staging of one layer
// becomes that of the next.
//
// Thread-safe. Lock order: mutex_ before the arena's.
#ifndef CLUSTERKV_CACHE_SERVICE_MEMORY_ACCOUNT_H_
#define CLUSTERKV_CACHE_SERVICE_MEMORY_ACCOUNT_H_

#include <array>
#include <cstdint>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "cache_service/arena.h"
#include "cache_service/presets.h"

namespace clusterkv::cache_service {

enum class MemoryUse {
  kParts = 0,    // index parts and sinks: kept until the sequence ends
  kStaging = 1,  // a layer's K and V as they came, until it is clustered
  kWindow = 2,   // decoded tokens as they came, until they are clustered
};
constexpr int kMemoryUses = 3;

// Pages by use.
struct MemoryPlan {
  std::array<int64_t, kMemoryUses> pages{};
  int64_t total() const { return pages[0] + pages[1] + pages[2]; }
  int64_t& operator[](MemoryUse use) { return pages[static_cast<size_t>(use)]; }
  int64_t operator[](MemoryUse use) const { return pages[static_cast<size_t>(use)]; }
};

// What a sequence of these parameters needs: parts and sinks of every layer, staging of two layers,
// windows and their parts for max_decode_tokens.
// Errors: INVALID_FIELD when an element of some array does not fit into a page.
absl::StatusOr<MemoryPlan> PlanSequence(const SequenceParams& params, int64_t page_bytes);
// What `decoded_tokens` more tokens need on top of `window_rows` that lie in the window already.
absl::StatusOr<MemoryPlan> PlanDecode(const SequenceParams& params, int64_t window_rows,
                                      int64_t decoded_tokens, int64_t page_bytes);

// Bytes of one token's K (or V) of all KV heads, as they come.
int64_t RowBytes(const kernels::KvShape& shape);

class MemoryAccount {
 public:
  // Errors: ARENA_FULL.
  static absl::StatusOr<std::shared_ptr<MemoryAccount>> Open(Arena* arena, const MemoryPlan& plan);

  // Out of the promise as far as it reaches, then out of what nobody was promised.
  // Errors: ARENA_FULL; nothing is taken then.
  absl::StatusOr<PageBlock> Allocate(MemoryUse use, int64_t pages);
  void Free(MemoryUse use, PageBlock block);
  // Gives the promise for `use` back, for good; what is freed of it later is free for all.
  void Waive(MemoryUse use);
  // Gives all promises back; what is freed later is free for all.
  void Close();
  // Pages promised and not taken.
  int64_t reserved_pages() const;

  Arena* arena() const { return arena_; }

 private:
  struct Promise {
    int64_t total = 0;
    int64_t taken = 0;  // by blocks that are alive
    PageReservation reservation;
  };
  explicit MemoryAccount(Arena* arena) : arena_(arena) {}

  Arena* const arena_;
  mutable absl::Mutex mutex_;
  std::array<Promise, kMemoryUses> promises_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_MEMORY_ACCOUNT_H_
