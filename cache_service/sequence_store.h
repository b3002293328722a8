// The shard's sequences by name: who is found, who is admitted, who must leave.
//
// A name is live from Open or Fork until release, eviction or the end of its lease; each life has a
// generation of its own. A call finds a sequence with a SequenceRef; what has a reference is not
// evicted, but may be released under it (its calls then answer SEQUENCE_RELEASED).
//
// Thread-safe. Lock order: mutex_ before a sequence's. `gone` and sequences' callbacks run without
// any lock.
#ifndef CLUSTERKV_CACHE_SERVICE_SEQUENCE_STORE_H_
#define CLUSTERKV_CACHE_SERVICE_SEQUENCE_STORE_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "cache_service/arena.h"
#include "cache_service/eviction_policy.h"
#include "cache_service/executors.h"
#include "cache_service/sequence.h"
#include "cache_service/shard.h"
#include "cache_service/shard_counters.h"

namespace clusterkv::cache_service {

class SequenceStore : public RoomMaker {
 public:
  // Told of every sequence that left, and why, after it did.
  using Gone =
      std::function<void(const std::shared_ptr<Sequence>&, v1::SessionResponse::Notice::Kind)>;

  SequenceStore(const ShardOptions& options, uint64_t boot_id, Arena* arena, Executors* executors,
                ShardDevice* device, ShardCounters* counters, CallCounter* calls, Gone gone);

  // Errors: INVALID_FIELD, BUDGET_ZERO, UNSUPPORTED, SEQUENCE_EXISTS, LIMIT_EXCEEDED, ARENA_FULL.
  absl::StatusOr<SequenceRef> Open(const v1::OpenSequenceRequest& request);
  // Errors: as Open and Find; SEQUENCE_NOT_READY.
  absl::StatusOr<SequenceRef> Fork(const v1::ForkSequenceRequest& request);
  // Errors: INVALID_FIELD, STALE_BOOT_ID, SEQUENCE_NOT_FOUND, STALE_GENERATION.
  absl::StatusOr<SequenceRef> Find(const v1::SequenceHandle& handle);
  // Ends what the handle names; OK if that is not there. Errors: INVALID_FIELD.
  absl::Status Release(const v1::SequenceHandle& handle);
  // Errors: as Find; SEQUENCE_NOT_READY when it is in use and `force` is not set.
  absl::Status Evict(const v1::SequenceHandle& handle, bool force);
  // By name, without references: to look at, not to keep.
  std::vector<std::shared_ptr<Sequence>> List(std::string_view prefix, std::string_view after,
                                              int64_t limit);
  std::vector<std::shared_ptr<Sequence>> All() { return List("", "", INT64_MAX); }

  // Evicts the sequence that the policy chooses among READY ones without references.
  bool EvictOne() override;
  // What it would choose from, of the names that begin with `prefix`.
  std::vector<std::string> EvictableNames(std::string_view prefix);
  // The same among these, `kept` left out.
  bool EvictForQuota(std::string_view prefix, std::string_view kept);
  // Ends sequences whose lease is over.
  void Expire();
  // The owner is gone: what it was filling ends, the rest lives by its ttl.
  void EndSession(uint64_t session_id);
  // Ends everything.
  void Clear(const absl::Status& reason);
  int64_t size() const;
  // A session's sequence is not sealed yet.
  bool Filling() const;

 private:
  absl::Status CheckName(const std::string& name) const;
  absl::Status CheckNew(const std::string& name) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status Admit(const std::string& name);
  absl::StatusOr<std::shared_ptr<MemoryAccount>> OpenAccount(const MemoryPlan& plan);
  absl::Status CheckRoom(int64_t pages);
  absl::StatusOr<SequenceRef> Insert(std::shared_ptr<Sequence> sequence);
  bool Evictable(const Sequence& sequence) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Evicts one of those whose names begin with `prefix` and are not `kept`, and counts it.
  bool EvictOneOf(std::string_view prefix, std::string_view kept, std::atomic<uint64_t>* counter);
  void Touch(Sequence& sequence);
  SequenceIdentity NewIdentity(const std::string& name);
  // Takes the sequences of which `leaves` is true out of the store and ends them.
  int64_t Remove(const std::function<bool(const Sequence&)>& leaves,
                 v1::SessionResponse::Notice::Kind kind);
  void End(const std::shared_ptr<Sequence>& sequence, v1::SessionResponse::Notice::Kind kind);

  const ShardOptions options_;
  const uint64_t boot_id_;
  const SequenceServices services_;
  const Gone gone_;
  const EvictionPolicy& eviction_;
  std::atomic<uint64_t> next_generation_{1}, uses_{1};
  mutable absl::Mutex mutex_;
  std::map<std::string, std::shared_ptr<Sequence>, std::less<>> sequences_ ABSL_GUARDED_BY(mutex_);
};

// Nanoseconds of the steady clock.
int64_t SteadyNow();

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_SEQUENCE_STORE_H_
