// Which tokens of one (sequence, layer, KV head) a decode worker still holds from earlier recalls.
//
// A pure state machine over token positions; the records themselves lie in slots that the owner
// keeps (slot_count() of them). Worker and service each run one over the same steps and so agree,
// without talking, on what a step must send: that is the *residency*. Equal inputs give equal
// states.
//
// A step: Resolve(tokens) says for each token which slot it has and whether its record is there
// already (hit) or must be recalled into it (miss). The policy's order is then as if the tokens had
// been touched in the given order, and what is over capacity has left, least recently used first; a
// step of more tokens than the capacity keeps its last ones. All tokens of the step, those that
// left too, keep their slots until the next Resolve. Pinned entries (Pin) never leave and count
// into the capacity.
//
// Under kClusterLru a cluster's unpinned tokens leave together, also those of the current step when
// their cluster is the least recently selected one; a resident token stays in the cluster it came
// with.
//
// Not thread-safe: one owner at a time.
// Sources: ClusterKV (arXiv 2412.03213) for the cache of the last R steps; RetroInfer (2505.02922)
// for LRU.
#ifndef CLUSTERKV_KERNELS_HOT_CACHE_HOT_CACHE_H_
#define CLUSTERKV_KERNELS_HOT_CACHE_HOT_CACHE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace clusterkv::kernels {

enum class HotCachePolicy : uint8_t {
  kTokenLru = 1,    // tokens leave one by one, least recently selected first
  kClusterLru = 2,  // a cluster's tokens leave together, least recently selected cluster first
  kLastSteps = 3,   // what the last `steps` steps selected stays (and no more than capacity)
};

struct HotCacheParams {
  HotCachePolicy policy = HotCachePolicy::kTokenLru;
  int64_t capacity_tokens = 1024;  // 0: every recall is a miss
  int64_t step_tokens = 64;        // most tokens that one step may resolve
  int steps = 1;                   // R of kLastSteps
};

class HotCache {
 public:
  // Errors: InvalidArgument for sizes out of [0, 2^24), step_tokens < 1, steps < 1.
  static absl::StatusOr<HotCache> Create(const HotCacheParams& params);
  HotCache(HotCache&&) noexcept;
  HotCache& operator=(HotCache&&) noexcept;
  ~HotCache();

  // Bytes that an instance takes for these parameters.
  static int64_t MemoryBytes(const HotCacheParams& params);
  // max(capacity_tokens, step_tokens) + pinned capacity, which is min(capacity_tokens,
  // step_tokens): slots in [0, slot_count()). Slots beyond the former are used only when something
  // is pinned, and by kClusterLru; lower slots are handed out first.
  int64_t slot_count() const;

  // positions [n] distinct; clusters [n] of each (empty unless kClusterLru); slots [n] out;
  // hits [n] out: 1 hit, 0 miss. A token's slot stays its own until it leaves the cache.
  // Errors: InvalidArgument for n > step_tokens, differing lengths, negative or repeated positions,
  // negative clusters; nothing is changed then.
  absl::Status Resolve(absl::Span<const int32_t> positions, absl::Span<const int32_t> clusters,
                       absl::Span<int32_t> slots, absl::Span<uint8_t> hits);

  // Keeps a resident token until Unpin. Errors: NotFound when it is not resident; ResourceExhausted
  // when capacity_tokens tokens are pinned already.
  absl::Status Pin(int32_t position);
  // It leaves when its turn comes, by when it was touched last. Errors: NotFound when it is not
  // pinned.
  absl::Status Unpin(int32_t position);

  bool Contains(int32_t position) const;
  int64_t size() const;  // resident tokens
  // Forgets everything, pins too.
  void Clear();
  // Order-dependent hash of the state: two caches that saw the same steps have the same.
  uint64_t Digest() const;

 private:
  struct Impl;
  explicit HotCache(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_HOT_CACHE_HOT_CACHE_H_
