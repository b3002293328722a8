// Decode workers that use a sequence, and the residency: what the service knows of their hot
// caches.
//
// An attachment has, per layer, one hot cache per KV head that runs over the same steps as the
// worker's own and so tells what the worker lacks. Steps of one (attachment, layer) run one after
// the other, in the order of their calls: Enter, answer, Leave.
//
// Thread-safe. Lock order: leaves; functions handed to Enter run without any lock.
#ifndef CLUSTERKV_CACHE_SERVICE_ATTACHMENTS_H_
#define CLUSTERKV_CACHE_SERVICE_ATTACHMENTS_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "cache_service/sequence.h"
#include "kernels/hot_cache/hot_cache.h"
#include "kernels/select/select.h"

namespace clusterkv::cache_service {

// Bytes that all residencies together may take. Thread-safe.
class ResidencyBudget {
 public:
  explicit ResidencyBudget(int64_t limit) : limit_(limit) {}
  // Errors: LIMIT_EXCEEDED, naming residency_bytes.
  absl::Status Take(int64_t bytes);
  void Give(int64_t bytes) { used_.fetch_sub(bytes); }
  int64_t used() const { return used_.load(); }

 private:
  const int64_t limit_;
  std::atomic<int64_t> used_{0};
};

// The residency of one layer.
class LayerResidency {
 public:
  // Nothing is allocated before the first Resolve. `budget` outlives it.
  LayerResidency(const kernels::HotCacheParams& params, int64_t kv_heads, ResidencyBudget* budget)
      : params_(params), kv_heads_(kv_heads), budget_(budget) {}
  ~LayerResidency();

  // Runs `step` now, or when those that entered before have left. Each Enter is followed by one
  // Leave, after its step.
  void Enter(std::function<void()> step);
  void Leave();

  // OK if `step` is the next one, or starts anew. Errors: RESIDENCY_STALE with expectedStep.
  absl::Status CheckStep(uint64_t step, bool reset) const;
  // Takes the step for every KV head: misses[h] are the positions that the worker lacks, as
  // indices into selections[h].positions, and slots[h] where it keeps them; and counts hits.
  // Clusters are given to the caches where the policy wants them.
  // Errors: as CheckStep; LIMIT_EXCEEDED, naming residency_bytes; INTERNAL_ERROR when a selection
  // is larger than step_tokens. Nothing is changed then.
  absl::Status Resolve(uint64_t step, bool reset,
                       const std::vector<kernels::HeadSelection>& selections,
                       std::vector<std::vector<int32_t>>* misses,
                       std::vector<std::vector<int32_t>>* slots, int64_t* hits);

 private:
  absl::Status CheckStepLocked(uint64_t step, bool reset) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status CreateCaches() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const kernels::HotCacheParams params_;
  const int64_t kv_heads_;
  ResidencyBudget* const budget_;
  mutable absl::Mutex mutex_;
  bool busy_ ABSL_GUARDED_BY(mutex_) = false;
  std::deque<std::function<void()>> queue_ ABSL_GUARDED_BY(mutex_);
  uint64_t next_step_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<kernels::HotCache> caches_ ABSL_GUARDED_BY(mutex_);  // [kv_heads] once created
  int64_t bytes_ ABSL_GUARDED_BY(mutex_) = 0;
};

class ResidentGroup;

struct Attachment {
  Attachment(uint64_t id, SequenceRef sequence, SequenceParams params,
             const kernels::HotCacheParams& hot_cache, uint64_t session_id,
             ResidencyBudget* budget);
  ~Attachment();

  const uint64_t id;
  const SequenceRef sequence;
  const SequenceParams params;  // the sequence's with what this attachment sets differently
  const kernels::SelectParams select;
  const kernels::HotCacheParams hot_cache;
  const uint64_t session_id;  // 0: none
  std::atomic<int64_t> last_use_ns;

  // The link that records take, with the layout of the worker's window. Null: gRPC.
  struct LinkInUse {
    std::shared_ptr<RecordLink> link;
    uint32_t generation = 0;
    int64_t layer_bytes = 0, head_bytes = 0;  // PEER: of v1::PeerWindow
  };
  LinkInUse CurrentLink() const {
    absl::MutexLock lock(&link_mutex);
    return link_in_use;
  }
  // The group that it is a member of; null: none. One that it leaves has ended when this returns.
  void SetResident(std::shared_ptr<ResidentGroup> group);
  std::shared_ptr<ResidentGroup> resident() const {
    absl::MutexLock lock(&link_mutex);
    return resident_group;
  }
  mutable absl::Mutex link_mutex;
  LinkInUse link_in_use ABSL_GUARDED_BY(link_mutex);
  std::shared_ptr<ResidentGroup> resident_group ABSL_GUARDED_BY(link_mutex);
  std::vector<std::unique_ptr<LayerResidency>> layers;  // [layers]
};

class Attachments {
 public:
  Attachments(int64_t max_attachments, int64_t residency_bytes, absl::Duration ttl)
      : max_attachments_(max_attachments), ttl_(ttl), budget_(residency_bytes) {}

  // Errors: LIMIT_EXCEEDED, naming max_attachments or residency_bytes; INVALID_FIELD for the hot
  // cache.
  absl::StatusOr<std::shared_ptr<Attachment>> Attach(SequenceRef sequence, SequenceParams params,
                                                     const v1::HotCacheConfig& hot_cache,
                                                     uint64_t session_id);
  // Errors: ATTACHMENT_NOT_FOUND.
  absl::StatusOr<std::shared_ptr<Attachment>> Find(uint64_t id);
  absl::Status Detach(uint64_t id);
  // Those that leave were taken out; sessions to be told.
  std::vector<std::shared_ptr<Attachment>> DetachSession(uint64_t session_id);
  std::vector<std::shared_ptr<Attachment>> DetachSequence(const Sequence* sequence);
  // Detaches those without session that were not used for the ttl.
  std::vector<std::shared_ptr<Attachment>> Expire();
  void Clear();
  int64_t size() const;
  int64_t of_sessions() const;           // those that end with a session
  int64_t by_link(v1::Link link) const;  // those whose records travel by it now
  int64_t CountIf(const std::function<bool(const Attachment&)>& counts) const;

 private:
  std::vector<std::shared_ptr<Attachment>> TakeIf(
      const std::function<bool(const Attachment&)>& leaves);

  const int64_t max_attachments_;
  const absl::Duration ttl_;
  ResidencyBudget budget_;
  mutable absl::Mutex mutex_;
  absl::flat_hash_map<uint64_t, std::shared_ptr<Attachment>> attachments_ ABSL_GUARDED_BY(mutex_);
};

// Most exact tokens that one select of one KV head may name: step_tokens of its hot caches.
int64_t MaxExactTokens(const SequenceParams& params);

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_ATTACHMENTS_H_
